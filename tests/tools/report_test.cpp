// The report for people: that its page is well formed and needs nothing else, whatever the report
// holds or lacks; that block reports survive their JSON; and the commands that make pages.
#include <doctest/doctest.h>

#include <cmath>
#include <optional>

#include "tests/tools/workshop.h"
#include "tools/report_html.h"
#include "tools/report_json.h"
#include "tools/report_svg.h"

namespace omq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// ---- a small judge of HTML

// A tag at the front of `text`: its name, and what its attributes hold. Nothing when it is none, or
// an attribute stands without quotes.
struct Tag {
  std::string name, values;
  size_t length = 0;
  bool closes = false, empty = false;
};
std::optional<Tag> tag_at(std::string_view text) {
  const auto word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '-'; };
  Tag t;
  size_t at = 1;
  if (at < text.size() && text[at] == '/') t.closes = ++at;
  while (at < text.size() && word(text[at])) t.name += text[at++];
  if (t.name.empty()) return std::nullopt;
  while (at < text.size() && text[at] == ' ') {
    while (++at < text.size() && word(text[at])) continue;
    if (text.substr(at, 2) != "=\"") return std::nullopt;
    const size_t end = text.find('"', at + 2);
    if (end == text.npos) return std::nullopt;
    t.values += ' ' + std::string(text.substr(at + 2, end - at - 2));
    at = end + 1;
  }
  if (at < text.size() && text[at] == '/') t.empty = ++at;
  if (at >= text.size() || text[at] != '>' || contains(t.values, "<")) return std::nullopt;
  t.length = at + 1;
  return t;
}

// Where `page` is not well formed: tags that do not close in order or are none, a bare &, a figure
// of a drawing that is no number. "" when it is.
std::string malformed(const std::string& page) {
  const std::string doctype = "<!DOCTYPE html>\n";
  if (!page.starts_with(doctype)) return "no doctype";
  std::vector<std::string> open;
  for (size_t at = doctype.size(); at < page.size(); ++at) {
    const std::string_view rest = std::string_view(page).substr(at);
    const std::string near(rest.substr(0, 80));
    const auto entity = [&](std::string_view e) { return rest.starts_with(e); };
    if (rest[0] == '&' && !(entity("&amp;") || entity("&lt;") || entity("&gt;") ||
                            entity("&quot;") || entity("&#39;")))
      return "bare & at " + near;
    if (rest[0] != '<') continue;
    const std::optional<Tag> tag = tag_at(rest);
    if (!tag || (!open.empty() && open.back() == "style" && !tag->closes))
      return "not a tag: " + near;
    at += tag->length - 1;
    const bool drawn = std::find(open.begin(), open.end(), "svg") != open.end();
    if (drawn && (contains(tag->values, "nan") || contains(tag->values, "inf")))
      return "no number: " + near;
    if (tag->closes) {
      if (open.empty() || open.back() != tag->name) return "unexpected " + near;
      open.pop_back();
    } else if (!tag->empty) {
      open.push_back(tag->name);
    }
  }
  return open.empty() ? "" : "not closed: " + open.back();
}

void check_page(const std::string& page) {
  CHECK(malformed(page) == "");
  for (const char* load :
       {"<script", "<link", "<img", "<iframe", "src=", "href=", "url(", "@import"})
    CHECK_FALSE(contains(page, load));
}

// ---- a report

quant::Histogram some_histogram(int64_t first) {
  return {.width = 1.0 / 256, .first = first, .counts = {1, 0, 7, 2}, .mean = 0.25};
}

std::vector<quant::BlockReport> some_blocks(size_t n) {
  std::vector<quant::BlockReport> blocks;
  for (size_t i = 0; i < n; ++i) {
    const auto k = static_cast<double>(i);
    quant::BlockReport b;
    b.index = static_cast<int>(i);
    b.name = fmt::format("model.layers.{}", i);
    b.epoch_loss = {1.0 + k, 0.8 + k, 0.7 + k};
    b.committed_loss = 0.7 + k;
    b.target_mean_square = 30;
    b.packed_error = 1e-6;
    b.seconds = 3.5 + k;
    b.peak_bytes = (i + 1) << 20;
    b.output_errors = true;
    for (const char* name : {"self_attn.q_proj", "mlp.down_proj"})
      b.linears.push_back({.name = name,
                           .error_nearest = 0.2 + 0.01 * k,
                           .error = 0.15,
                           .gamma = some_histogram(240),
                           .beta = some_histogram(200)});
    b.sites.push_back({.name = "qkv", .log2_scale = some_histogram(-3), .shift = {}});
    blocks.push_back(std::move(b));
  }
  blocks.front().recoveries.push_back({2, 0.5, "learnable gamma_logit"});
  return blocks;
}

json some_report(size_t n = 3) {
  json blocks = json::array();
  for (const auto& b : some_blocks(n)) blocks.push_back(block_json(b));
  return {
      {"omq_version", "0.1.0"},
      {"model", {{"name", "Tiny"}, {"type", "llama"}}},
      {"recipe",
       {{"method", "omniquant"},
        {"setting", "w3a16g64"},
        {"wbits", 3},
        {"abits", 16},
        {"group_size", 64},
        {"symmetric", false},
        {"transformation", {{"alpha", 0.5}, {"shift", true}}},
        {"epochs", 3},
        {"batch_size", 1},
        {"learning_rates", {{"lwc", 0.01}}},
        {"calibration",
         {{"source", "some text"}, {"windows", 4}, {"tokens", 64}, {"ids_sha256", "abc"}}}}},
      {"source", {{{"file", "m.safetensors"}, {"bytes", 1000}, {"sha256", "f00d"}}}},
      {"calibration_seconds", 100.0},
      {"threads", 2},
      {"blocks", blocks},
      {"size", {{"bits_per_weight", 4.5}, {"block_bits_per_weight", 3.5}, {"weight_bytes", 5000}}},
      {"evaluation",
       {{{"model", "packed"},
         {"perplexity", 28.391},
         {"file", "/some/where/wiki.txt"},
         {"windows", 148},
         {"context", 2048},
         {"file_sha256", "beef"}}}},
      {"model_sha256", "cafe"},
      {"peak_memory_bytes", 1 << 30}};
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + part.size())) ++n;
  return n;
}

}  // namespace

TEST_CASE("report: the judge of pages sees what is wrong") {
  const std::string head = "<!DOCTYPE html>\n";
  CHECK(malformed(head + "<p class=\"a\">x &amp; y<br/></p>\n") == "");
  for (const char* bad : {"<p>", "</p>", "<p><b></p></b>", "<p class=a></p>", "<p>a < b</p>",
                          "<p>a & b</p>", "<p title=\"<\"></p>", "<style>a<b</style>"}) {
    CAPTURE(bad);
    CHECK(malformed(head + bad) != "");
  }
  CHECK(malformed("<p></p>") == "no doctype");
  CHECK(malformed(head + "<svg><path d=\"M1 2H-inf\"/></svg>") != "");
  CHECK(malformed(head + "<svg><text x=\"1\">nan</text></svg>") == "");
}

TEST_CASE("report: a page holds what the report says, and nothing that must be loaded") {
  const std::string page = report_page(some_report(), "r");
  check_page(page);
  CHECK_FALSE(contains(page, "http:"));
  CHECK_FALSE(contains(page, "https:"));
  for (const char* said :
       {"<h1>Tiny <span>w3a16g64, omniquant</span></h1>", "4 calibration windows of 64 tokens",
        "<b>3.500</b>", "<b>28.39</b><span>perplexity, wiki.txt</span>", "<b>1:40</b>",
        "<b>1.00 GiB</b>", "3 bits, groups of 64, with zero points", "f00d", "abc", "beef", "cafe",
        "learnable gamma_logit", "Figure 6. ", "norm → q, k, v", "148 × 2048"}) {
    CAPTURE(said);
    CHECK(contains(page, said));
  }
  CHECK(count(page, "<svg ") == 6);
  CHECK(count(page, "class=\"alarm\"") == 1);
  CHECK(count(page, "<polyline") == 3 + 2 * 3);  // a loss curve a block, three lines a linear
  CHECK(report_page(some_report(), "r") == page);
  for (const size_t n : {1, 2, 13, 40, 70}) check_page(report_page(some_report(n), "r"));
}

TEST_CASE("report: a weighed loss and a searched start are told where there are any") {
  json r = some_report();
  CHECK_FALSE(contains(report_page(r, "r"), "search"));
  r["recipe"]["augmented_loss"] = true;
  r["recipe"]["augmented_loss_weight"] = 0.5;
  r["recipe"]["clip_search"] = r["recipe"]["token_loss"] = true;
  const std::string page = report_page(r, "r");
  check_page(page);
  CHECK(contains(page,
                 "augmented by that on quantised inputs times 0.5; tokens count by their size"));
  CHECK(contains(page, "starts where a search put it"));
  CHECK_FALSE(contains(page, "clip_search"));
}

TEST_CASE("report: text from outside stays text") {
  const std::string evil = "<script>alert('\"&\x01')</script>";
  json r = some_report();
  r["model"]["name"] = r["recipe"]["setting"] = r["recipe"]["method"] = evil;
  r["recipe"]["calibration"]["source"] = r["recipe"]["added later"] = evil;
  r["recipe"][evil] = evil;
  r["source"][0]["file"] = r["source"][0]["sha256"] = r["evaluation"][0]["file"] = evil;
  r["evaluation"][0]["protocol"] = r["omq_version"] = r["model_sha256"] = evil;
  for (json& b : r["blocks"]) {
    b["block"] = evil;
    b["linears"][0]["name"] = evil + "." + evil;
    b["sites"][0]["name"] = evil;
  }
  r["blocks"][0]["recoveries"][0]["tensor"] = evil;
  const std::string page = report_page(r, "r");
  check_page(page);
  CHECK(contains(page, "&lt;script&gt;alert(&#39;&quot;&amp;\xef\xbf\xbd&#39;)&lt;/script&gt;"));
}

TEST_CASE("report: what is missing is said, and the rest is there") {
  const json whole = some_report();
  for (const auto& [key, ignored] : whole.items()) {
    CAPTURE(key);
    json r = whole;
    r.erase(key);
    if (key == "omq_version" || key == "recipe" || key == "blocks") {
      CHECK(contains(message_of([&] { report_page(r, "r.json"); }),
                     fmt::format("r.json: not a report of omq-quant: \"{}\"", key)));
      continue;
    }
    check_page(report_page(r, "r"));
  }
  for (const auto& [key, ignored] : whole["blocks"][0].items()) {
    CAPTURE(key);
    json r = whole;
    for (json& b : r["blocks"]) b.erase(key);
    check_page(report_page(r, "r"));
  }
  json r = whole;
  for (json& b : r["blocks"])
    for (const char* key : {"linears", "sites", "linear_errors"}) b.erase(key);
  r.erase("evaluation");
  const std::string page = report_page(r, "r");
  CHECK(contains(page, "The report does not hold errors of linears."));
  CHECK(contains(page, "No clip factors: "));
  CHECK(contains(page, "There is no transformation, or the report does not hold it."));
  CHECK(contains(page, "No perplexity was measured"));
  CHECK(count(page, "<svg ") == 3);
  r["recipe"] = json::object();
  r["blocks"] = json::array();
  const std::string bare = report_page(r, "r");
  check_page(bare);
  CHECK(contains(bare, "The report does not hold the settings."));
  CHECK(contains(bare, "No text went through the blocks"));
  CHECK(count(bare, "<svg ") == 0);
}

TEST_CASE("report: values of any kind give a page or an error, never anything else") {
  const json whole = some_report(2);
  const json odd[] = {
      nullptr,          -1, 1e300, 0, 1e-320, true, "a<b&", json::array(), json::object(),
      {1, "x", nullptr}};
  const json flat = whole.flatten();
  int pages = 0, errors = 0;
  for (const auto& [pointer, ignored] : flat.items())
    for (const json& value : odd) {
      json r = whole;
      r[json::json_pointer(pointer)] = value;
      try {
        const std::string page = report_page(r, "r");
        ++pages;
        if (const std::string what = malformed(page); !what.empty())
          FAIL_CHECK(pointer << " = " << value.dump() << ": " << what);
      } catch (const Error& e) {
        ++errors;
        CHECK(std::string(e.what()).size() > 10);
      }
    }
  CHECK(pages > 300);
  CHECK(errors > 100);
}

TEST_CASE("report: what is no report says so") {
  CHECK(contains(message_of([] { report_page(json::array(), "x.json"); }),
                 "x.json: not a report of omq-quant"));
  json r = some_report();
  r["blocks"][1]["seconds"] = "long";
  CHECK(contains(message_of([&] { report_page(r, "x.json"); }),
                 "while reading block 1 of x.json: report of a block: "));
  r = some_report();
  r["blocks"][2] = 7;
  CHECK(message_of([&] { report_page(r, "x.json"); }) ==
        "while reading block 2 of x.json: an object is expected, not number");
  r = some_report();
  r["blocks"][0]["linears"][0]["gamma"]["counts"] = {1, -2};
  CHECK(contains(message_of([&] { report_page(r, "x.json"); }), "report of a block: a histogram"));
}

TEST_CASE("report: a block's report survives its JSON") {
  for (const quant::BlockReport& b : some_blocks(2)) {
    const json j = block_json(b);
    const quant::BlockReport back = block_from_json(json::parse(j.dump()));
    CHECK(back.name == b.name);
    CHECK(back.epoch_loss == b.epoch_loss);
    CHECK(back.committed_loss == b.committed_loss);
    CHECK(back.target_mean_square == b.target_mean_square);
    CHECK(back.packed_error == b.packed_error);
    CHECK(back.seconds == b.seconds);
    CHECK(back.peak_bytes == b.peak_bytes);
    CHECK(back.output_errors == b.output_errors);
    CHECK(back.linears == b.linears);
    CHECK(back.sites == b.sites);
    CHECK(back.recoveries.size() == b.recoveries.size());
    CHECK(block_json(back) == j);
    CHECK(json::parse(readable(j)) == j);
  }
  // Of a version that did not look at linears: accepted, without them.
  json old = block_json(some_blocks(1)[0]);
  for (const char* key : {"linears", "sites", "linear_errors"}) old.erase(key);
  CHECK(block_from_json(old).linears.empty());
  // Half of it is not.
  old["linears"] = json::array();
  CHECK(contains(message_of([&] { block_from_json(old); }), "linear_errors"));
  CHECK(readable({{"a", {1, 2}}, {"b", {{"c", json::array()}}}}) ==
        "{\n  \"a\": [1,2],\n  \"b\": {\n    \"c\": []\n  }\n}\n");
}

TEST_CASE("report: numbers and axes") {
  using svg::number, svg::tick_label;
  CHECK(number(0.012345) == "0.0123");
  CHECK(number(0.9999) == "1.00");
  CHECK(number(12345.6) == "12346");
  CHECK(number(-0.5, 2) == "−0.50");
  CHECK(number(1.234e-5) == "1.23·10⁻⁵");
  CHECK(number(-2e17, 1) == "−2·10¹⁷");
  CHECK(number(NAN) == "–");
  CHECK(tick_label(0.05) == "0.05");
  CHECK(tick_label(1e-5) == "10⁻⁵");
  CHECK(tick_label(2e6) == "2·10⁶");
  CHECK(tick_label(0.125) == "0.125");

  const std::vector<double> narrow{2, 3.5}, wide{0.002, 5}, none{0, -1, NAN, INFINITY};
  const svg::Axis a = svg::fit(narrow, 100, 0);
  CHECK_FALSE(a.log);
  CHECK(a.lo == 0);
  CHECK(a.ticks(4) == std::vector<double>{0, 1, 2, 3, 4});
  CHECK(a(0) == 100);
  CHECK(a(4) == 0);
  CHECK(a(NAN) == 100);
  CHECK(a(1e30) == 0);
  const svg::Axis b = svg::fit(wide, 0, 4);
  CHECK(b.log);
  CHECK(b(0.01) == doctest::Approx(1));
  CHECK(b(0) == 0);
  CHECK(b.ticks(4).size() == 5);
  CHECK(svg::fit(none, 0, 1).hi == 1);
  const svg::Axis c = svg::around(std::vector<double>{0.87, 0.99}, 1, 0, 1);
  CHECK(c.lo == doctest::Approx(0.85));
  CHECK(c.hi == doctest::Approx(1));
  CHECK(svg::around({}, 1, 0, 1).lo < svg::around({}, 1, 0, 1).hi);
  CHECK(svg::places(3, 0, 30)(1) == 15);
}

TEST_CASE("report: at the end of a run, and again from the folder or the file, the same page") {
  const Workshop w;
  for (const std::string more : {"--preset w4a4 --epochs 1", "--method rtn"}) {
    CAPTURE(more);
    const std::string base =
        fmt::format("-m {} -o {} --calib {} --nsamples 3 --seqlen 24 --force {} ", w.path("model"),
                    w.path("out"), w.path("calib.txt"), more);
    const Outcome o = w.quant(base + "--eval-context 64 --eval ppl:" + w.path("test.txt") +
                              " --report " + w.path("page.html"));
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    CHECK(o.out.starts_with("perplexity "));
    CHECK(contains(o.err, "page: "));
    const std::string page = read_file(w.dir / "page.html");
    check_page(page);
    CHECK(contains(page, "<h1>model <span>"));
    for (const std::string source : {"out", "out/report.json"}) {
      const Outcome again =
          w.quant(fmt::format("report {} -o {}", w.path(source), w.path("again.html")));
      CAPTURE(again.err);
      CHECK(again.code == 0);
      CHECK(again.out.empty());
      CHECK(read_file(w.dir / "again.html") == page);
    }
  }
  // Without text there is still something to say; into the folder that the run makes.
  const Outcome o = w.quant(fmt::format("-m {} -o {} --method rtn --force --report {}",
                                        w.path("model"), w.path("out"), w.path("out/page.html")));
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  const std::string page = read_file(w.dir / "out/page.html");
  check_page(page);
  CHECK(contains(page, "of its weights, since no text was given"));
  CHECK(contains(page, "This method rounds to nearest."));
  CHECK(contains(page, "No text went through the blocks"));
}

TEST_CASE("report: a page that cannot be written costs nothing") {
  const Workshop w({.layers = 1});
  w.check_refused(w.quick("--report " + w.path("nowhere/page.html")), 1, "there is no folder");
  w.check_refused(w.quick("--report " + w.path("model")), 1, "a folder; give the name of a file");
  w.check_refused(w.quick("--report " + w.path("model/")), 1, "a folder; give the name of a file");
  w.check_refused(w.quick("--report"), 2, "--report");
  for (const std::string model : {"model/model.safetensors", "out/report.json"})
    w.check_refused(w.quick("--report " + w.path(model)), 1, "a page's name ends in .html");
  REQUIRE(w.quant(w.quick()).code == 0);
  const std::string out = w.path("out"), page = " -o " + w.path("page.html");
  w.check_refused("report", 2, "which one? give the folder of a run");
  w.check_refused("report " + out, 2, "-o FILE.html is missing");
  w.check_refused("report " + out + page + " --outptu x", 2, "--outptu");
  w.check_refused("report " + out + " -o " + w.path("out/model.safetensors"), 1,
                  "a page's name ends in .html");
  w.check_refused("report " + w.path("nothing") + page, 1, "nothing: no such file");
  w.check_refused("report " + w.path("model") + page, 1, "report.json: no such file");
  w.check_refused("report " + w.path("calib.txt") + page, 1, "calib.txt: not valid JSON");
  w.check_refused("report " + w.path("out/config.json") + page, 1,
                  "config.json: not a report of omq-quant: \"omq_version\" is missing");
  w.check_refused("report " + out + " -o " + w.path("nowhere/p.html"), 1, "there is no folder");
  w.check_refused("report " + out + " -o " + out, 1, "a folder; give the name of a file");
  w.check_refused("report " + out + " -o " + w.path("out/report.json"), 1,
                  "is the report itself; choose another name");
  // A full disk: neither the page nor half of it, and an older one stays.
  w.check_refused("report " + out + page, 1, "page.html: cannot write", "ulimit -f 8;");
  write_file(w.dir / "page.html", "older");
  w.check_refused("report " + out + page, 1, "page.html: cannot write", "ulimit -f 8;");
  CHECK(read_file(w.dir / "page.html") == "older");
  CHECK(w.report()["blocks"].size() == 1);
  CHECK(run_program("omq-quant", "report --help").code == 0);
}

}  // namespace omq
