"""Writes the golden files of this folder with PyTorch and Hugging Face transformers, on the CPU, from fixed seeds.

  make_golden.py [OUT] [--only NAME,...]      OUT: this folder unless told; NAME: a folder or file below
Needs torch, transformers, safetensors (PyPI), which the project itself does not need. Four random checkpoints with their
logits (llama3-sharded, mistral, qwen2, qwen3), operators with their gradients (ops), ten steps of AdamW (adamw).
README.md has the names and shapes. Every checkpoint is read back from the written files before its logits are computed,
and each feature is switched off once to see that the logits notice: a golden that a wrong reader passes proves nothing.
"""
import argparse, json, math, os, shutil, tempfile
import torch, transformers
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
LIMIT = 200_000                          # bytes a golden, all files together



def save(tensors, path, metadata):
    """save_file with the metadata in a fixed order: its own is random, and the same seed should give the same bytes."""
    save_file(tensors, path, metadata)
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little"))); data = f.read()
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode(); text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + data)


# ---------------------------------------------------------------------------------------------- checkpoints
VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV, TOKENS, GREEDY = 96, 32, 64, 2, 4, 2, 40, 24


def config(kind, **extra):
    """The keys of a config.json as the published models of that family have them (before transformers 5)."""
    return dict(architectures=[kind], hidden_act="silu", hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, num_key_value_heads=KV, vocab_size=VOCAB, max_position_embeddings=512,
                initializer_range=0.02, attention_dropout=0.0, use_cache=True, bos_token_id=1, eos_token_id=2,
                transformers_version="4.43.0") | extra


MODELS = {
    # head_dim 16 is not 32 / 4. Wavelengths 6.3 | 19.9, 62.8 | 199 … 19 869 positions around 64 / 4 and 64: kept, blended, slowed.
    "llama3-sharded": dict(seed=31, dtype=torch.bfloat16, shards=3, config=config(
        "LlamaForCausalLM", model_type="llama", torch_dtype="bfloat16", head_dim=16, rms_norm_eps=1e-5, rope_theta=10000.0,
        rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64, rope_type="llama3"),
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False, pretraining_tp=1)),
    "mistral": dict(seed=232, dtype=torch.float32, shards=1, config=config(
        "MistralForCausalLM", model_type="mistral", torch_dtype="float32", rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=None, tie_word_embeddings=False)),
    "qwen2": dict(seed=33, dtype=torch.bfloat16, shards=1, config=config(
        "Qwen2ForCausalLM", model_type="qwen2", torch_dtype="bfloat16", rms_norm_eps=1e-6, rope_theta=1000000.0,
        sliding_window=512, use_sliding_window=False, max_window_layers=LAYERS, tie_word_embeddings=True)),
    "qwen3": dict(seed=34, dtype=torch.bfloat16, shards=1, config=config(
        "Qwen3ForCausalLM", model_type="qwen3", torch_dtype="bfloat16", head_dim=16, rms_norm_eps=1e-6, rope_theta=1000000.0,
        rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=LAYERS, attention_bias=False,
        tie_word_embeddings=False)),
}


def weights(c, gen):
    """Random weights of a size that makes attention choose: every part of the block then shows in the logits."""
    hd = c.get("head_dim") or HIDDEN // HEADS
    rnd = lambda *s, std=1.0: torch.randn(*s, generator=gen) * std
    mat = lambda o, i, gain=1.0: rnd(o, i, std=gain / math.sqrt(i))
    norm = lambda n: 1 + rnd(n, std=0.25)
    S = {"model.embed_tokens.weight": rnd(VOCAB, HIDDEN, std=0.4 if c["tie_word_embeddings"] else 1.0)}   # tied: or it repeats its last token
    for l in range(LAYERS):
        p = f"model.layers.{l}."
        S |= {p + "input_layernorm.weight": norm(HIDDEN), p + "post_attention_layernorm.weight": norm(HIDDEN)}
        for n, heads, gain in (("q", HEADS, 1.6), ("k", KV, 1.6), ("v", KV, 1.5)):
            S[p + f"self_attn.{n}_proj.weight"] = mat(heads * hd, HIDDEN, gain)
            if c["model_type"] == "qwen2":
                S[p + f"self_attn.{n}_proj.bias"] = rnd(heads * hd, std=0.5)
        if c["model_type"] == "qwen3":
            S |= {p + "self_attn.q_norm.weight": norm(hd), p + "self_attn.k_norm.weight": norm(hd)}
        S |= {p + "self_attn.o_proj.weight": mat(HIDDEN, HEADS * hd, 1.5), p + "mlp.gate_proj.weight": mat(FFN, HIDDEN),
              p + "mlp.up_proj.weight": mat(FFN, HIDDEN), p + "mlp.down_proj.weight": mat(HIDDEN, FFN, 1.5)}
    S["model.norm.weight"] = norm(HIDDEN)
    if not c["tie_word_embeddings"]:
        S["lm_head.weight"] = mat(VOCAB, HIDDEN, 1.5)
    return S


def write_json(path, value):
    with open(path, "w", encoding="utf8") as f:
        json.dump(value, f, indent=2); f.write("\n")


def write_checkpoint(folder, m):
    shutil.rmtree(folder, ignore_errors=True); os.makedirs(folder)
    write_json(f"{folder}/config.json", m["config"])
    S = {k: v.to(m["dtype"]) for k, v in weights(m["config"], torch.Generator().manual_seed(m["seed"])).items()}
    if m["shards"] == 1:
        return save(S, f"{folder}/model.safetensors", {"format": "pt"})
    names = list(S); per = -(-len(names) // m["shards"]); where = {}          # cut inside a layer, as large models are
    for i in range(m["shards"]):
        file = f"model-{i + 1:05}-of-{m['shards']:05}.safetensors"; part = names[i * per:(i + 1) * per]
        save({n: S[n] for n in part}, f"{folder}/{file}", {"format": "pt"}); where |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in S.values())
    write_json(f"{folder}/model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})


def load(folder, config_file="config.json", edit=None, dtype=torch.float32):
    """The model that transformers reads from the files, with another config or changed weights if asked."""
    with tempfile.TemporaryDirectory() as t:
        for f in os.listdir(folder):
            if f.startswith("model"): shutil.copy(f"{folder}/{f}", t)
        c = json.load(open(f"{folder}/{config_file}")); c |= (edit or {}).get("config", {}); write_json(f"{t}/config.json", c)
        model, info = AutoModelForCausalLM.from_pretrained(t, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, p in model.named_parameters():
        for part, value in (edit or {}).get("weights", {}).items():
            if part in name: p.data.fill_(value)
    return model.eval()


@torch.no_grad()
def logits(model, ids): return model(input_ids=ids[None].long(), use_cache=False).logits[0]


@torch.no_grad()
def greedy(model, ids, n):
    out, gaps = ids.tolist(), []
    for _ in range(n):
        top = logits(model, torch.tensor(out))[-1].topk(2); out.append(top.indices[0].item()); gaps.append((top.values[0] - top.values[1]).item())
    return torch.tensor(out[len(ids):], dtype=torch.int32), min(gaps)


NOTICE = {  # what a careless reader might leave out
    "llama3-sharded": {"no RoPE scaling": dict(config={"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})},
    "mistral": {"RoPE theta 10000": dict(config={"rope_theta": 10000.0})},
    "qwen2": {"no q bias": dict(weights={"q_proj.bias": 0.0}), "no k bias": dict(weights={"k_proj.bias": 0.0}),
              "no v bias": dict(weights={"v_proj.bias": 0.0})},
    "qwen3": {"q_norm 1": dict(weights={"q_norm": 1.0}), "k_norm 1": dict(weights={"k_norm": 1.0})},
}


def make_model(out, name):
    folder, m = f"{out}/{name}", MODELS[name]; write_checkpoint(folder, m)
    v5 = os.path.join(folder, "config-v5.json")                       # the same model as transformers 5 writes it
    with tempfile.TemporaryDirectory() as t:
        AutoConfig.from_pretrained(folder).save_pretrained(t); c = json.load(open(f"{t}/config.json"))
    c.pop("torch_dtype", None); c["dtype"] = m["config"]["torch_dtype"]
    assert "rope_parameters" in c and "rope_theta" not in c, "this transformers writes the older style"
    write_json(v5, c)
    ids = torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1000 + m["seed"]), dtype=torch.int32); ids[0] = 1
    model = load(folder); y = logits(model, ids); exact = logits(load(folder, dtype=torch.float64), ids)
    rounding = (y - exact).abs().max().item()
    assert torch.equal(y, logits(load(folder, "config-v5.json"), ids)), "the two config styles disagree"
    for what, edit in NOTICE[name].items():
        d = (logits(load(folder, edit=edit), ids) - y).abs().max().item(); print(f"  {name}: {what}: logits move by {d:.3f}")
        assert d > 0.1, what
    if name == "llama3-sharded":
        f = 10000.0 ** -(torch.arange(0, 16, 2).float() / 16); r = model.model.rotary_emb.inv_freq / f
        assert (r == 1).any() and (r == 1 / 8).any() and ((r > 0.13) & (r < 0.99)).any(), r     # all three regimes
    more, gap = greedy(model, ids[:8], GREEDY); assert gap > 1e-3, f"{name}: a near tie in the greedy text, take another seed"
    nll = F.cross_entropy(y[:-1].double(), ids[1:].long(), reduction="none").float()
    save({"input_ids": ids, "logits": y.contiguous(), "token_loss": nll, "greedy_ids": more}, f"{folder}/expected.safetensors",
              VERSIONS | {"seed": str(m["seed"]), "weights": str(m["dtype"])[6:], "compute": "float32", "greedy_prompt": "8",
                          "float32_rounding": f"{rounding:.1e}"})
    print(f"  {name}: logits {tuple(y.shape)} rms {y.pow(2).mean().sqrt():.2f}, float32 rounding {rounding:.1e}, "
          f"smallest greedy gap {gap:.3f}, {len(set(more.tolist()))} different greedy ids")


# ---------------------------------------------------------------------------------------------- operators
def rope(x, theta=10000.0):
    """x [B,T,H,d] at positions 0 … T−1, rotate-half form: element i turns with element i + d/2."""
    d = x.shape[-1]; a = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * theta ** -(torch.arange(0, d, 2, dtype=x.dtype) / d)
    c, s = a.cos()[None, :, None], a.sin()[None, :, None]; u, v = x.chunk(2, -1)
    return torch.cat([u * c - v * s, v * c + u * s], -1)


def rms_norm(x, w, eps=1e-5): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def attention(q, k, v):
    """q [B,T,H,d], k and v [B,T,K,d]; causal, query head h reads key/value head h·K/H, scale 1/√d → [B,T,H,d]."""
    g = q.shape[2] // k.shape[2]; k, v = k.repeat_interleave(g, 2), v.repeat_interleave(g, 2)
    s = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhts,bshd->bthd", s.softmax(-1), v)


def make_ops(out, seed=41):
    gen, T = torch.Generator().manual_seed(seed), {}

    def r(*shape, std=1.0, mean=0.0):                                 # float32 values in float64 arithmetic
        return (torch.randn(*shape, generator=gen) * std + mean).double()

    def ids(n, *shape): return torch.randint(0, n, shape, generator=gen, dtype=torch.int32)

    def case(name, f, dy=None, **inputs):
        """Integers are inputs without gradient. dy: what the gradient of the output is taken to be (random unless given)."""
        x = {k: v if v.dtype == torch.int32 else v.clone().requires_grad_() for k, v in inputs.items()}
        y = f(**x); dy = r(*y.shape) if dy is None else dy; y.backward(dy)
        T[f"{name}.output.y"] = y; T[f"{name}.dy"] = dy
        for k, v in x.items():
            T[f"{name}.input.{k}"] = v
            if v.requires_grad: T[f"{name}.grad.{k}"] = v.grad

    case("rms_norm", rms_norm, x=r(3, 5, 16), w=r(16, std=0.3, mean=1.0))
    case("silu_mul", lambda gate, up: F.silu(gate) * up, gate=r(3, 7, 10, std=3.0), up=r(3, 7, 10))
    case("softmax", lambda x: x.softmax(-1), x=r(4, 6, 9, std=4.0))
    case("rope", lambda x: rope(x), x=r(2, 7, 3, 8))
    q, k, v = r(1, 7, 4, 8, std=1.5), r(1, 7, 2, 8, std=1.5), r(1, 7, 2, 8)
    case("attention", attention, q=q, k=k, v=v)
    case("rope_attention", lambda q, k, v: attention(rope(q), rope(k), v), q=q, k=k, v=v)
    logit, target = r(6, 11, std=3.0), ids(11, 6)
    case("cross_entropy", lambda logits, target: F.cross_entropy(logits, target.long()),
         dy=torch.ones((), dtype=torch.float64), logits=logit, target=target)
    T["cross_entropy.output.token_loss"] = F.cross_entropy(logit, target.long(), reduction="none")
    case("embedding", lambda table, ids: F.embedding(ids.long(), table), table=r(12, 8),
         ids=torch.tensor([[3, 0, 11, 3, 7], [3, 5, 5, 1, 0]], dtype=torch.int32))
    case("linear", lambda x, w, b: F.linear(x, w, b), x=r(2, 5, 12), w=r(9, 12), b=r(9))
    # A whole gated half-block, to catch a gradient that is lost where paths join.
    case("gated_mlp", lambda x, norm, gate, up, down: x + F.linear(F.silu(F.linear(rms_norm(x, norm), gate)) * F.linear(rms_norm(x, norm), up), down),
         x=r(2, 6, 8), norm=r(8, std=0.3, mean=1.0), gate=r(20, 8, std=0.5), up=r(20, 8, std=0.5), down=r(8, 20, std=0.3))
    T = {k: v.detach().to(torch.int32 if v.dtype == torch.int32 else torch.float32).contiguous() for k, v in T.items()}
    save(T, f"{out}/ops.safetensors", VERSIONS | {"seed": str(seed), "compute": "float64", "rms_norm_eps": "1e-5", "rope_theta": "10000"})
    for k, v in sorted(T.items()): print(f"  {k:32} {list(v.shape)}")


# ---------------------------------------------------------------------------------------------- optimizer
def make_adamw(out, seed=42, steps=10, n=8):
    gen = torch.Generator().manual_seed(seed)
    h = torch.logspace(-3, 1, n, dtype=torch.float32).double()         # curvatures from flat to steep
    start, target = (torch.randn(n, generator=gen).double() for _ in range(2)); T = {"curvature": h, "target": target}
    settings = {"wd0": dict(lr=1e-2, weight_decay=0.0), "wd01": dict(lr=1e-2, weight_decay=0.1)}
    for name, s in settings.items():
        p = torch.nn.Parameter(start.clone()); opt = torch.optim.AdamW([p], betas=(0.9, 0.999), eps=1e-8, **s); P, G, L = [start.clone()], [], []
        for _ in range(steps):
            opt.zero_grad(); loss = 0.5 * (h * (p - target) ** 2).sum(); loss.backward()
            L.append(loss.detach()); G.append(p.grad.clone()); opt.step(); P.append(p.detach().clone())
        T |= {f"{name}.param": torch.stack(P), f"{name}.grad": torch.stack(G), f"{name}.loss": torch.stack(L),
              f"{name}.exp_avg": opt.state[p]["exp_avg"], f"{name}.exp_avg_sq": opt.state[p]["exp_avg_sq"]}
    save({k: v.float().contiguous() for k, v in T.items()}, f"{out}/adamw.safetensors",
              VERSIONS | {"seed": str(seed), "compute": "float64", "lr": "1e-2", "beta1": "0.9", "beta2": "0.999",
                          "eps": "1e-8", "wd": "wd0: 0, wd01: 0.1"})
    print("  adamw: last parameters", [round(v, 4) for v in T["wd01.param"][-1].tolist()])


def size(path):
    return os.path.getsize(path) if os.path.isfile(path) else sum(os.path.getsize(f"{path}/{f}") for f in os.listdir(path))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", nargs="?", default=os.path.dirname(os.path.abspath(__file__))); ap.add_argument("--only", default="")
    a = ap.parse_args(); os.makedirs(a.out, exist_ok=True)
    torch.set_num_threads(1); transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    todo = {n: (lambda n=n: make_model(a.out, n)) for n in MODELS}
    todo |= {"ops.safetensors": lambda: make_ops(a.out), "adamw.safetensors": lambda: make_adamw(a.out)}
    for name, make in todo.items():
        if a.only and name.split(".")[0] not in [s.split(".")[0] for s in a.only.split(",")]: continue
        make(); n = size(f"{a.out}/{name}"); print(f"{name}: {n} bytes", flush=True); assert n <= LIMIT, f"{name} is too large to commit"
        for d, _, files in os.walk(a.out):
            for f in files: os.chmod(f"{d}/{f}", 0o644)


if __name__ == "__main__":
    main()
