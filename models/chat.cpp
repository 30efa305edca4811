// Recognising and rendering the four prompt formats; see chat.h.
//
// Recognition works on canonical_jinja(): the expression that writes a message must be there as the
// format has it, and the places where templates of one format differ are read from the text around
// it.

#include "models/chat.h"

#include <algorithm>
#include <chrono>

#include "models/chat_jinja.h"
#include "models/tokenizer_utf8.h"
#include "tensor/error.h"

namespace omq {

namespace {

constexpr std::string_view kNames[] = {"chatml", "llama2", "llama3", "zephyr"};
constexpr std::string_view kLlama3Header = "<|start_header_id|>";

bool has(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

// What stands between `before` and the next `after`, or nothing when `before` is not there.
std::optional<std::string> between(std::string_view text, std::string_view before,
                                   std::string_view after, bool last = false) {
  const size_t at = last ? text.rfind(before) : text.find(before);
  if (at == text.npos) return {};
  const size_t begin = at + before.size(), end = text.find(after, begin);
  if (end == text.npos) return {};
  return std::string(text.substr(begin, end - begin));
}

// As Python's str.strip(): Unicode white space, and the four separators U+001C … U+001F.
std::string strip(std::string_view text) {
  size_t begin = text.size(), end = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t at = i;
    const char32_t c = utf8_next(text, i);
    if (char_class(c) == CharClass::Space || (c >= 0x1C && c <= 0x1F)) continue;
    begin = std::min(begin, at);
    end = i;
  }
  return begin < end ? std::string(text.substr(begin, end - begin)) : std::string();
}

// In UTC: the zone of the machine would bring in the C library's database of zones.
std::string today() {
  using namespace std::chrono;
  constexpr const char* kMonths[] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                     "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  const year_month_day date{floor<days>(system_clock::now())};
  return fmt::format("{:02} {} {}", static_cast<unsigned>(date.day()),
                     kMonths[static_cast<unsigned>(date.month()) - 1],
                     static_cast<int>(date.year()));
}

// What a canonical template writes outside its tags, except around those that end the program with
// an error.
std::string plain_text(std::string_view text) {
  std::string out;
  bool raised = false;
  for (size_t i = 0; i < text.size();) {
    const bool code = text.substr(i, 2) == "{{", block = text.substr(i, 2) == "{%";
    if (code || block) {
      raised = text.substr(i).starts_with("{{raise_exception(");
      if (raised) out.resize(out.find_last_not_of(" \n") + 1);
      i = std::min(text.size(), text.find(code ? "}}" : "%}", i)) + 2;
    } else {
      if (!raised || (text[i] != ' ' && text[i] != '\n')) out += text[i];
      ++i;
    }
  }
  return out;
}

[[noreturn]] void unrecognised(std::string_view why) {
  fail(
      "chat template: the model's own template is not one that is known here ({}); choose one with "
      "--chat-template NAME (chatml, llama2, llama3, zephyr)",
      why);
}

void need(bool ok, std::string_view why) {
  if (!ok) unrecognised(why);
}

}  // namespace

std::string_view ChatTemplate::name() const { return kNames[static_cast<int>(format_)]; }

ChatTemplate ChatTemplate::named(std::string_view name, std::string bos, std::string eos) {
  for (int i = 0; i < 4; ++i) {
    if (name != kNames[i]) continue;
    ChatTemplate t(static_cast<ChatFormat>(i), std::move(bos), std::move(eos));
    switch (t.format_) {
      case ChatFormat::ChatML:
        t.bos_.clear();
        t.turn_end_ = "\n", t.prompt_ = "<|im_start|>assistant\n";
        break;
      case ChatFormat::Llama2:
        break;
      case ChatFormat::Llama3:
        t.trim_ = true;
        break;
      case ChatFormat::Zephyr:
        t.bos_.clear();
        t.turn_end_ = "\n", t.prompt_ = "<|assistant|>\n";
        break;
    }
    return t;
  }
  fail("chat template {:?} is not known; known are chatml, llama2, llama3, zephyr", name);
}

ChatTemplate ChatTemplate::recognise(std::string_view jinja, std::string bos, std::string eos) {
  const std::string text = canonical_jinja(jinja);
  // Only Zephyr's lets its layout show, as the line end after a message.
  need(has(text, "<|user|>") || plain_text(text).empty(), "it writes text between its tags");
  const auto start = [&](ChatFormat format) { return ChatTemplate(format, bos, eos); };
  if (has(text, "<|im_start|>")) {
    auto t = start(ChatFormat::ChatML);
    t.recognise_chatml(text);
    return t;
  }
  if (has(text, kLlama3Header)) {
    auto t = start(ChatFormat::Llama3);
    t.recognise_llama3(text);
    return t;
  }
  if (has(text, "[INST]")) {
    auto t = start(ChatFormat::Llama2);
    t.recognise_llama2(text);
    return t;
  }
  need(has(text, "<|user|>"), "no marker of a known format in it");
  auto t = start(ChatFormat::Zephyr);
  t.recognise_zephyr(text);
  return t;
}

ChatTemplate ChatTemplate::of(const Tokenizer& tokenizer, std::string_view name) {
  const auto piece = [&](std::optional<int32_t> id) {
    return id ? tokenizer.token_piece(*id) : std::string();
  };
  const auto& eos_ids = tokenizer.eos_ids();
  const std::string bos = piece(tokenizer.bos_id());
  const std::string eos = eos_ids.empty() ? std::string() : piece(eos_ids[0]);
  if (!name.empty()) return named(name, bos, eos);
  check(!tokenizer.chat_template().empty(),
        "chat template: the model has none; choose one with --chat-template NAME (chatml, llama2, "
        "llama3, zephyr)");
  return recognise(tokenizer.chat_template(), bos, eos);
}

void ChatTemplate::recognise_chatml(std::string_view text) {
  need(!has(text, "strftime_now") && !has(text, "system_message") && !has(text, "<|im_sep|>"),
       "a variant of ChatML");
  const std::string role = "`<|im_start|>`+message[`role`]+`\n`+";
  std::optional<std::string> end;
  for (const char* content : {"message[`content`]", "content"})
    if (!end) end = between(text, role + content + "+`<|im_end|>", "`");
  if (!end) {
    end = between(text, role + "message[`content`].strip()+`<|im_end|>", "`");
    trim_ = end.has_value();
  }
  need(end.has_value() && strip(*end).empty(), "a variant of ChatML");
  turn_end_ = *end;
  const auto prompt = between(text, "{{`<|im_start|>assistant", "`}}", true);
  need(prompt.has_value(), "ChatML without an assistant prompt");
  prompt_ = "<|im_start|>assistant" + *prompt;
  if (!has(text, "{{bos_token}}")) bos_.clear();
  strip_thoughts_ = has(text, "</think>");
  // The default system message is a literal of its own, `<|im_start|>system\n…<|im_end|>`.
  const std::string open = "`<|im_start|>system\n";
  for (size_t at = 0; (at = text.find(open, at)) != text.npos; ++at) {
    const auto literal = between(text.substr(at), open, "`");
    if (!literal || !has(*literal, "<|im_end|>")) continue;
    default_system_ = literal->substr(0, literal->find("<|im_end|>"));
    return;
  }
}

void ChatTemplate::recognise_llama2(std::string_view text) {
  need(has(text, "<<SYS>>"), "[INST] without <<SYS>>");
  need(has(text, "{{bos_token+`[INST] `+content.strip()+` [/INST]`}}") &&
           has(text, "{{` `+content.strip()+` `+eos_token}}") && has(text, "\n<</SYS>>\n\n`"),
       "a variant of Llama-2");
  trim_ = has(text, "messages[0][`content`].strip()");
  default_system_ = between(text, "{%setsystem_message=`", "`%}").value_or("");
  if (default_system_.starts_with("<<SYS>>")) default_system_.clear();
}

void ChatTemplate::recognise_llama3(std::string_view text) {
  const std::string open = "`<|start_header_id|>`+message[`role`]+`<|end_header_id|>\n\n`+";
  trim_ = has(text, open + "message[`content`].strip()+`<|eot_id|>`");
  need(trim_ || has(text, open + "message[`content`]+`<|eot_id|>`"), "a variant of Llama-3");
  need(has(text, "`<|start_header_id|>assistant<|end_header_id|>\n\n`"),
       "Llama-3 without an assistant prompt");
  if (!has(text, "bos_token")) bos_.clear();
  const auto cutoff = between(text, "{{`Cutting Knowledge Date: ", "`}}");
  if (!cutoff) {
    need(!has(text, "date_string"), "a variant of Llama-3");
    return;
  }
  need(has(text, "`Today Date: `+date_string+`\n\n`"), "a variant of Llama-3.1");
  std::optional<std::string> date = between(text, "{%setdate_string=`", "`%}");
  if (has(text, "strftime_now(`%d %b %Y`)")) date = today();
  need(date.has_value(), "Llama-3.1 without a date");
  date_ = "Cutting Knowledge Date: " + *cutoff + "Today Date: " + *date + "\n\n";
}

void ChatTemplate::recognise_zephyr(std::string_view text) {
  const auto end = between(text, "{{`<|user|>\n`+message[`content`]+eos_token}}", "{%");
  need(end.has_value(), "a variant of Zephyr");
  for (const char* role : {"<|system|>", "<|assistant|>"})
    need(between(text, fmt::format("{{{{`{}\n`+message[`content`]+eos_token}}}}", role), "{%") ==
             end,
         "a variant of Zephyr");
  turn_end_ = *end;
  const size_t tail = text.rfind("add_generation_prompt%}{{`<|assistant|>");
  need(tail != text.npos, "Zephyr without an assistant prompt");
  const auto literal = between(text.substr(tail), "{{`", "`}}");
  const auto after = between(text.substr(tail), "`}}", "{%");
  need(literal && after, "Zephyr without an assistant prompt");
  prompt_ = *literal + *after;
  need(plain_text(text).size() == 3 * end->size() + after->size(), "a variant of Zephyr");
  bos_.clear();
}

std::string ChatTemplate::render(const std::vector<Message>& messages) const {
  check(!messages.empty(), "chat: there are no messages");
  for (const Message& m : messages)
    check(m.role == "system" || m.role == "user" || m.role == "assistant",
          "chat: role {:?} is not system, user or assistant", m.role);
  switch (format_) {
    case ChatFormat::ChatML:
      return render_chatml(messages);
    case ChatFormat::Llama2:
      return render_llama2(messages);
    case ChatFormat::Llama3:
      return render_llama3(messages);
    case ChatFormat::Zephyr:
      return render_zephyr(messages);
  }
  fail("chat: unknown format");
}

std::string ChatTemplate::render_chatml(const std::vector<Message>& messages) const {
  std::string out = bos_;
  const auto turn = [&](std::string_view role, std::string_view content) {
    out += fmt::format("<|im_start|>{}\n{}<|im_end|>", role, trim_ ? strip(content) : content);
    out += turn_end_;
  };
  if (!default_system_.empty() && messages[0].role != "system") turn("system", default_system_);
  for (const Message& m : messages) {
    std::string_view content = m.content;
    const size_t thought = content.rfind("</think>");
    if (strip_thoughts_ && m.role == "assistant" && thought != content.npos) {
      content.remove_prefix(thought + 8);
      while (content.starts_with('\n')) content.remove_prefix(1);
    }
    turn(m.role, content);
  }
  return out + prompt_;
}

std::string ChatTemplate::render_llama2(const std::vector<Message>& messages) const {
  std::string out, system;
  size_t first = 0;
  bool has_system = false;
  if (messages[0].role == "system") {
    system = trim_ ? strip(messages[0].content) : messages[0].content;
    has_system = true;
    first = 1;
  } else if (!default_system_.empty() && !has(messages[0].content, "<<SYS>>")) {
    system = default_system_;
    has_system = true;
  }
  for (size_t i = first; i < messages.size(); ++i) {
    const Message& m = messages[i];
    const bool question = (i - first) % 2 == 0;
    check((m.role == "user") == question && m.role != "system",
          "chat: Llama-2 roles must alternate user, assistant, user, …; message {} is {:?}", i,
          m.role);
    std::string content = m.content;
    if (i == first && has_system) content = "<<SYS>>\n" + system + "\n<</SYS>>\n\n" + content;
    content = strip(content);
    out += question ? bos_ + "[INST] " + content + " [/INST]" : " " + content + " " + eos_;
  }
  return out;
}

std::string ChatTemplate::render_llama3(const std::vector<Message>& messages) const {
  std::string out = bos_;
  const auto turn = [&](std::string_view role, std::string_view content) {
    out += fmt::format("{}{}<|end_header_id|>\n\n{}<|eot_id|>", kLlama3Header, role, content);
  };
  const auto text = [&](const Message& m) { return trim_ ? strip(m.content) : m.content; };
  size_t first = 0;
  if (!date_.empty()) {
    const bool own = messages[0].role == "system";
    turn("system", date_ + (own ? text(messages[0]) : std::string()));
    first = own ? 1 : 0;
  }
  for (size_t i = first; i < messages.size(); ++i) turn(messages[i].role, text(messages[i]));
  return out + fmt::format("{}assistant<|end_header_id|>\n\n", kLlama3Header);
}

std::string ChatTemplate::render_zephyr(const std::vector<Message>& messages) const {
  std::string out;
  for (const Message& m : messages)
    out += fmt::format("<|{}|>\n{}{}{}", m.role, m.content, eos_, turn_end_);
  return out + prompt_;
}

}  // namespace omq
