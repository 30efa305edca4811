// Chat templates: the prompts that Jinja writes for the models' own templates (expected strings by
// jinja2).

#include "models/chat.h"

#include <doctest/doctest.h>

#include "tensor/error.h"

namespace omq {
namespace {

const std::vector<Message> kShort = {{"user", " Hi\n"}};
const std::vector<Message> kLong = {
    {"system", " Be brief.\n"}, {"user", "a"}, {"assistant", " b "}, {"user", "c"}};

std::string prompt(std::string_view jinja, const std::vector<Message>& messages) {
  return ChatTemplate::recognise(jinja, "<s>", "</s>").render(messages);
}

constexpr std::string_view kSmol =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n' "
    "}}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

TEST_CASE("ChatML: SmolLM2's default system message, and the plain form") {
  const auto t = ChatTemplate::recognise(kSmol, "<|im_start|>", "<|im_end|>");
  CHECK(t.name() == "chatml");
  CHECK(t.render(kShort) ==
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n"
        "<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n");
  const std::string with_system =
      "<|im_start|>system\n Be "
      "brief.\n<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n b "
      "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n";
  CHECK(t.render(kLong) == with_system);
  const auto plain = ChatTemplate::named("chatml", "<s>", "</s>");
  CHECK(plain.render(kLong) == with_system);
  CHECK(plain.render(kShort) == "<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n");
}

TEST_CASE("ChatML spread over lines, with escapes, double quotes and thoughts to drop") {
  const std::string_view jinja = R"({%- if messages[0].role == 'system' %}
    {{- "<|im_start|>system\n" + messages[0].content + "<|im_end|>\n" }}
{%- else %}
    {{- "<|im_start|>system\nYou're Qwen.<|im_end|>\n" }}
{%- endif %}
{# a comment with a }} in it #}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
)";
  CHECK(
      prompt(jinja, {{"user", "x"}, {"assistant", "<think>\nhm\n</think>\n\ny"}, {"user", "z"}}) ==
      "<|im_start|>system\nYou're "
      "Qwen.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
      "y<|im_end|>\n<|im_start|>user\nz<|im_end|>\n<|im_start|>assistant\n");
}

constexpr std::string_view kLlama2 =
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set "
    "system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = "
    "false %}{% "
    "endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % "
    "2 == 0) "
    "%}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if loop.index0 == 0 "
    "and "
    "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if "
    "message['role'] == "
    "'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

TEST_CASE("Llama-2") {
  CHECK(prompt(kLlama2, kShort) == "<s>[INST] Hi [/INST]");
  const std::string expected =
      "<s>[INST] <<SYS>>\n Be brief.\n\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]";
  CHECK(prompt(kLlama2, kLong) == expected);
  CHECK(ChatTemplate::named("llama2", "<s>", "</s>").render(kLong) == expected);
  CHECK_THROWS_WITH_AS(prompt(kLlama2, {{"assistant", "x"}}), doctest::Contains("must alternate"),
                       Error);
  CHECK_THROWS_AS(prompt(kLlama2, {{"user", "x"}, {"system", "y"}}), Error);
}

constexpr std::string_view kLlama3 =
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ "
    "content "
    "}}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}";

TEST_CASE("Llama-3, and 3.1 with its dates") {
  const std::string expected =
      "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
      "<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
      "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_"
      "header_id|>\n\n";
  CHECK(prompt(kLlama3, kLong) == expected);
  CHECK(ChatTemplate::named("llama3", "<s>", "</s>").render(kLong) == expected);
  const std::string_view dated = R"({{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'+
        message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
)";
  CHECK(prompt(dated, kShort) ==
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul "
        "2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n");
  CHECK(prompt(dated, kLong).find("2024\n\nBe brief.<|eot_id|>") != std::string::npos);
}

constexpr std::string_view kZephyr =
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
    "message['content'] "
    "+ eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + "
    "message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + "
    "message['content'] + "
    "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' "
    "}}\n{% "
    "endif %}\n{% endfor %}";

TEST_CASE("Zephyr") {
  const std::string expected =
      "<|system|>\n Be brief.\n</s>\n<|user|>\na</s>\n<|assistant|>\n b "
      "</s>\n<|user|>\nc</s>\n<|assistant|>\n";
  CHECK(prompt(kZephyr, kLong) == expected);
  CHECK(ChatTemplate::named("zephyr", "<s>", "</s>").render(kLong) == expected);
}

TEST_CASE("templates that are none of the four are refused, and say what to do") {
  const std::string_view others[] = {
      "",
      "{% for m in messages %}{{ m }}{% endfor %}",
      "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' "
      "}}{% endfor %}",
      "{% for message in messages %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% endfor "
      "%}",
      "{% set system_message = 'x' %}{{'<|im_start|>' + message['role'] + '\n' + "
      "message['content'] + "
      "'<|im_end|>'}}{{'<|im_start|>assistant\n'}}",
      "Chat: {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}"
      "{{'<|im_start|>assistant\n'}}"};
  for (const std::string_view jinja : others) {
    CAPTURE(jinja);
    CHECK_THROWS_WITH_AS(prompt(jinja, kShort), doctest::Contains("--chat-template"), Error);
  }
  for (const std::string_view broken :
       {"{{ 'x }}", "{% if", "{{ x", "{", "{%", "{{-", "{%-%}", "{{'\\"}) {
    CAPTURE(broken);
    CHECK_THROWS_AS(prompt(broken, kShort), Error);
  }
  CHECK_THROWS_WITH_AS(ChatTemplate::named("alpaca", "", ""), doctest::Contains("known are chatml"),
                       Error);
  CHECK_THROWS_WITH_AS(prompt(kSmol, {}), doctest::Contains("no messages"), Error);
  CHECK_THROWS_WITH_AS(prompt(kSmol, {{"tool", "x"}}), doctest::Contains("role \"tool\""), Error);
}

}  // namespace
}  // namespace omq
