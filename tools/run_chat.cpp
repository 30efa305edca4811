// omq-run chat: a conversation in the model's own prompt format. Answers go to stdout, everything
// else to stderr.
//
// Each turn is the whole conversation as a prompt; the generator computes only what its cache does
// not hold yet.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "models/chat.h"
#include "models/json_file.h"
#include "tools/run_common.h"

namespace omq::run {
namespace {

constexpr std::string_view kHelp =
    "/exit           leave (or Ctrl-D; Ctrl-C twice)\n"
    "/reset          forget the conversation, but for the system message\n"
    "/system TEXT    set the system message and forget the conversation; without TEXT: show it\n"
    "/save FILE      write the conversation as JSON\n"
    "/load FILE      go on with a saved conversation\n"
    "/stats          figures of the last answer\n"
    "/help           this list\n"
    "A line that ends in \\ goes on in the next one. Ctrl-C stops an answer.\n";

struct Options {
  ModelOptions model;
  SamplingOptions sampling;
  std::string system, chat_template, prompt, template_file;
  bool no_perf = false, single = false, json = false;
};

bool parse(const cli::Args& args, Options& o) {
  CLI::App app("Converses with a model. Answers go to stdout, everything else to stderr.",
               "omq-run chat");
  add_model_options(app, o.model);
  app.add_option("--system", o.system, "-sys: system message")->type_name("TEXT");
  app.add_option("-p,--prompt", o.prompt, "first message of the user")->type_name("TEXT");
  app.add_flag("--single-turn", o.single, "-st: leave after the first answer");
  auto* name = app.add_option("--chat-template", o.chat_template,
                              "chatml, llama2, llama3 or zephyr (default: the model's own)");
  app.add_option("--chat-template-file", o.template_file,
                 "the template of a file, if it is one of these")
      ->type_name("FILE")
      ->excludes(name);
  add_sampling_options(app, o.sampling);
  app.add_flag("--json", o.json, "each answer as one JSON object a line, with its figures");
  app.add_flag("--no-perf", o.no_perf, "no figures at the end");
  if (!cli::parse(app, args, kAliases)) return false;
  constexpr std::array kKnown = {"", "chatml", "llama2", "llama3", "zephyr"};
  if (std::find(kKnown.begin(), kKnown.end(), o.chat_template) == kKnown.end())
    throw cli::UsageError(
        fmt::format("--chat-template {}: chatml, llama2, llama3 or zephyr", o.chat_template));
  return true;
}

ChatTemplate open_template(const Options& o, const Tokenizer& t) {
  if (o.template_file.empty()) return ChatTemplate::of(t, o.chat_template);
  const std::string bos = t.bos_id() ? t.token_piece(*t.bos_id()) : "";
  const std::string eos = t.eos_ids().empty() ? "" : t.token_piece(t.eos_ids().front());
  return ChatTemplate::recognise(read_text_file(o.template_file), bos, eos);
}

class Conversation {
 public:
  Conversation(const Options& o, const OpenModel& m)
      : o_(o),
        m_(m),
        template_(open_template(o, *m.tokenizer)),
        generator_(*m.model, *m.tokenizer),
        options_(generate_options(o.sampling, m.model->config().vocab_size)) {
    options_.cancel = interrupt_.flag();
    if (!o_.json)
      options_.on_text = [](std::string_view text) {
        fmt::print("{}", text);
        check(std::fflush(stdout) == 0, "cannot write to standard output");
      };
    reset(o.system);
  }

  void reset(const std::string& system) {
    messages_.clear();
    if (!system.empty()) messages_.push_back({"system", system});
  }

  // One turn. A message that cannot be answered is taken back.
  void say(const std::string& text) {
    messages_.push_back({"user", text});
    try {
      const std::string prompt = template_.render(messages_);
      const std::vector<int32_t> ids =
          m_.tokenizer->encode(prompt, {.add_bos = false, .parse_special = true});
      interrupt_.release();
      last_ = generator_.generate(ids, options_);
    } catch (...) {
      messages_.pop_back();
      throw;
    }
    ++options_.sampling.seed;  // the same question twice need not have the same answer
    messages_.push_back({"assistant", last_.text});
    answered_ = true;
    if (o_.json) {
      nlohmann::json j = stats_json(last_, m_, options_.sampling.seed - 1);
      j["text"] = last_.text;
      fmt::print("{}\n", json_text(j));
      std::fflush(stdout);
    } else {
      fmt::print("\n");
      std::fflush(stdout);
    }
    if (last_.finish == FinishReason::ContextFull)
      fmt::print(
          stderr,
          "warning: the context of {} tokens is full, the answer was cut; /reset or a larger -c\n",
          generator_.context());
  }

  // False when the conversation is over.
  bool command(const std::string& line) {
    const size_t space = line.find(' ');
    const std::string name = line.substr(0, space);
    const std::string rest =
        space == line.npos ? ""
                           : line.substr(line.find_last_not_of(' ') < space ? space : space + 1);
    if (name == "/exit" || name == "/quit" || name == "/bye") return false;
    if (name == "/reset") {
      reset(system());
    } else if (name == "/system") {
      if (rest.empty())
        fmt::print(stderr, "system: {}\n", system().empty() ? "(none)" : system());
      else
        reset(rest);
    } else if (name == "/save") {
      save(rest);
    } else if (name == "/load") {
      load(rest);
    } else if (name == "/stats") {
      stats();
    } else if (name == "/help" || name == "/?") {
      fmt::print(stderr, "{}", kHelp);
    } else {
      fmt::print(stderr, "unknown command {}; /help lists them\n", name);
    }
    return true;
  }

  void stats() const {
    if (answered_)
      print_stats(last_, m_, options_.sampling.seed - 1);
    else
      fmt::print(stderr, "no answer yet\n");
  }
  bool answered() const { return answered_; }
  bool cancelled() const { return last_.finish == FinishReason::Cancelled; }
  std::string_view template_name() const { return template_.name(); }
  // While the user types, the first Ctrl-C after an answer explains how to leave; see Interrupt.
  void waiting(bool yes) { interrupt_.waiting(yes); }

 private:
  std::string system() const {
    return !messages_.empty() && messages_.front().role == "system" ? messages_.front().content
                                                                    : "";
  }

  void save(const std::string& file) const {
    check(!file.empty(), "/save needs a file name");
    nlohmann::json j = nlohmann::json::array();
    for (const Message& m : messages_) j.push_back({{"role", m.role}, {"content", m.content}});
    const std::string text = json_text(j, 2) + "\n";
    std::FILE* const out = std::fopen(file.c_str(), "w");
    check(out != nullptr, "/save: cannot write {}: {}", file, std::strerror(errno));
    const bool written = std::fwrite(text.data(), 1, text.size(), out) == text.size();
    check((std::fclose(out) == 0) && written, "/save: cannot write {}", file);
    fmt::print(stderr, "{} messages saved to {}\n", messages_.size(), file);
  }

  void load(const std::string& file) {
    check(!file.empty(), "/load needs a file name");
    const nlohmann::json j = parse_json(read_text_file(file), file);
    check(j.is_array(), "{}: a list of messages is wanted", file);
    std::vector<Message> messages;
    for (const auto& m : j) {
      const bool ok = m.is_object() && m.contains("role") && m["role"].is_string() &&
                      m.contains("content") && m["content"].is_string();
      check(ok, "{}: message {} has no role and content", file, messages.size());
      messages.push_back({m["role"].get<std::string>(), m["content"].get<std::string>()});
    }
    messages_ = std::move(messages);
    fmt::print(stderr, "{} messages loaded\n", messages_.size());
  }

  const Options& o_;
  const OpenModel& m_;
  ChatTemplate template_;
  Generator generator_;
  GenerateOptions options_;
  Interrupt interrupt_;
  std::vector<Message> messages_;
  GenerateResult last_;
  bool answered_ = false;
};

// A message of one or (with \ at line ends) several lines. False at the end of the input.
bool read_message(std::string& message, bool terminal) {
  message.clear();
  for (bool more = true; more;) {
    if (terminal) fmt::print(stderr, "{}", message.empty() ? "> " : ". ");
    std::optional<std::string> line = cli::read_line(stdin);
    if (!line) return !message.empty();
    if (line->ends_with('\r')) line->pop_back();
    more = line->ends_with('\\');
    if (more) line->back() = '\n';
    message += *line;
  }
  return true;
}

// Runs f; on a terminal an error is shown and the conversation goes on, in a script it ends the
// program.
template <class F> void guarded(bool terminal, F&& f) {
  try {
    f();
  } catch (const Error& e) {
    if (!terminal) throw;
    fmt::print(stderr, "{}\n", e.what());
  }
}

}  // namespace

int chat(const cli::Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  apply(o.model);
  check_sampling(o.sampling);
  const OpenModel m = open_model(o.model, o.model.context);
  Conversation conversation(o, m);
  const bool terminal = cli::is_terminal(stdin);
  if (terminal && !o.model.quiet)
    fmt::print(stderr, "prompt format {}; /help lists the commands\n",
               conversation.template_name());
  bool open = true;
  if (!o.prompt.empty()) {
    if (terminal) fmt::print(stderr, "> {}\n", o.prompt);
    guarded(terminal, [&] { conversation.say(o.prompt); });
    open = !o.single;
  }
  std::string message;
  auto next = [&] {
    conversation.waiting(true);
    const bool more = read_message(message, terminal);
    conversation.waiting(false);
    return more;
  };
  while (open && next()) {
    if (message.find_first_not_of(" \t\n") == message.npos) continue;
    if (message.starts_with('/'))
      guarded(terminal, [&] { open = conversation.command(message); });
    else
      guarded(terminal, [&] {
        conversation.say(message);
        open = !o.single;
      });
  }
  if (terminal) fmt::print(stderr, "\n");
  if (!o.no_perf && !o.model.quiet && !o.json && conversation.answered()) conversation.stats();
  return 0;
}

}  // namespace omq::run
