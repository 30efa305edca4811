// The story teller: a few facts are drawn, then events change and recall them. Words:
// story_words.h.
//
// Sentences are templates. {H} is the hero, {he} {He} {him} {his} the pronouns that fit, {F} {fhe}
// {fhim} those of the friend; the other words in braces are facts.

#include "tools/story_grammar.h"

#include <array>
#include <initializer_list>
#include <map>
#include <string_view>
#include <utility>

#include "tensor/error.h"
#include "tools/story_words.h"

namespace omq {

namespace {

using namespace story;

std::string capital(std::string_view word) {
  std::string out(word);
  out[0] = static_cast<char>(out[0] - 'a' + 'A');
  return out;
}

class Teller {
 public:
  explicit Teller(uint64_t seed) : random_(seed) {}

  std::string tell() {
    draw_facts();
    opening();
    gather();
    using Event = void (Teller::*)();
    std::array<Event, 7> events = {&Teller::find_more,   &Teller::share, &Teller::eat,
                                   &Teller::meet_animal, &Teller::lose,  &Teller::compare,
                                   &Teller::ask};
    for (size_t i = events.size() - 1; i > 0; --i)
      std::swap(events[i], events[random_.below(i + 1)]);
    const int told = random_.between(2, 4);
    const int night =
        random_.chance(40) ? random_.between(1, told) : 0;  // the event after which a day ends
    for (int i = 0; i < told; ++i) {
      (this->*events[static_cast<size_t>(i)])();
      if (i + 1 == night) next_day();
    }
    ending();
    return std::move(text_);
  }

 private:
  using Templates = std::initializer_list<std::string_view>;

  template <class Table> const auto& pick(const Table& table) {
    return table[random_.below(table.size())];
  }

  // Appends one of the sentences, its facts filled in.
  void say(Templates choices) {
    const std::string_view sentence = choices.begin()[random_.below(choices.size())];
    if (!text_.empty()) text_ += ' ';
    for (size_t i = 0; i < sentence.size(); ++i) {
      if (sentence[i] != '{') {
        text_ += sentence[i];
        continue;
      }
      const size_t end = sentence.find('}', i);
      const auto fact = facts_.find(sentence.substr(i + 1, end - i - 1));
      check(fact != facts_.end(), "story grammar: no fact for {:?}", sentence.substr(i));
      text_ += fact->second;
      i = end;
    }
  }

  void set(std::string_view key, std::string_view value) {
    facts_.insert_or_assign(std::string(key), std::string(value));
  }
  void set_person(const Person& p, std::string_view name, const std::string& prefix) {
    const std::string_view he = p.girl ? "she" : "he";
    set(name, p.name);
    set(prefix + "he", he);
    set(prefix + "him", p.girl ? "her" : "him");
    set(prefix + "his", p.girl ? "her" : "his");
    set(prefix + "He", capital(he));
    set(prefix + "His", p.girl ? "Her" : "His");
    set(prefix + "girl", p.girl ? "girl" : "boy");
  }
  // {key} = "three", {key things} = "three apples".
  void set_count(const std::string& key, int n) {
    const std::string_view word = kNumbers[static_cast<size_t>(n)];
    set(key, word);
    set(key + " things", fmt::format("{} {}", word, n == 1 ? noun_.one : noun_.many));
  }
  void set_have(int n) {
    have_ = n;
    set_count("n", n);
  }
  void set_weather() {
    const Weather& w = pick(kWeather);
    set("weather", w.word);
    set("gear", w.gear);
    set("why", w.why);
  }

  void draw_facts() {
    const size_t hero = random_.below(kPeople.size());
    const size_t other = (hero + 1 + random_.below(kPeople.size() - 1)) % kPeople.size();
    set_person(kPeople[hero], "H", "");
    set_person(kPeople[other], "F", "f");
    const Place& place = pick(kPlaces);
    set("at", place.at);
    set("to", place.to);
    const size_t spot = random_.below(3);
    set("spot", place.spots[spot]);
    set("spot2", place.spots[(spot + 1) % 3]);
    set("spot3", place.spots[(spot + 2) % 3]);
    noun_ = pick(place.finds);
    set("thing", noun_.one);
    set("things", noun_.many);
    const Family& family = pick(kFamily);
    set("kin", family.who);
    set("home", family.home);
    day_ = random_.below(kDays.size());
    set("day", kDays[day_]);
    set_weather();
    set("trait", pick(kTraits));
    set("color", pick(kColors));
    set("box", pick(kBoxes));
    set("look", pick(kLooks));
    set("animal", pick(kAnimals));
  }

  void opening() {
    say({"Once there was a {trait} {girl} named {H}.", "{H} was a {trait} {girl}.",
         "There once lived a {trait} {girl} named {H}."});
    say({"{He} lived {home} with {his} {kin}.", "{H} and {his} {kin} lived {home}."});
    say({"On {day} it was {weather}, so {he} took {his} {gear}.",
         "On {day} {he} took {his} {gear}, because {why}."});
    say({"{H} went {to} with a {color} {box}.", "{He} carried a {color} {box} and walked {to}."});
    say({"There {he} met {his} friend {F}.", "{His} friend {F} was {at} too.",
         "A {fgirl} named {F} was waiting there."});
  }

  void gather() {
    set_have(random_.between(3, 6));  // at most 3 more twice: the words for numbers end at twelve
    say({"{H} found {n things} {spot}.", "{H} looked around and saw {n things} {spot}."});
    say({"{He} put them into the {color} {box}.", "They all went into the {color} {box}."});
  }

  void find_more() {
    const int more = random_.between(1, 3);
    set_count("k", more);
    set_have(have_ + more);
    say({"Then {H} found {k} more {spot2}.", "{F} helped {him} to find {k} more."});
    say({"Now {he} had {n things}.", "That made {n things}."});
  }

  void share() {
    if (have_ < 2) return ask();
    const int given = random_.between(1, have_ > 3 ? 3 : have_ - 1);
    set_count("k", given);
    set_have(have_ - given);
    theirs_ += given;
    set_count("m", theirs_);
    moral_ = "shared";
    say({"\"May I have {k things}?\" asked {F}.", "\"Please give me {k things},\" said {F}.",
         "{F} had no {box} and looked sad."});
    say({"\"Yes,\" said {H}, and {he} gave {fhim} {k}.", "{H} smiled and gave {fhim} {k things}."});
    say({"Now {H} had {n things} and {F} had {m}.",
         "So {F} had {m things}, and {n} were left for {H}."});
  }

  void eat() {
    if (!noun_.food || have_ < 2) return find_more();
    set_have(have_ - 1);
    say({"{H} was hungry and ate one {thing}.", "One {thing} looked so good that {H} ate it."});
    say({"Then {he} had {n} left.", "Now there were {n things} in the {box}."});
  }

  void meet_animal() {
    animal_ = true;
    say({"Suddenly there was a {look} {animal} {spot3}.", "A {look} {animal} was sitting {spot3}.",
         "Then they heard a {look} {animal} {spot3}."});
    if (noun_.food && have_ > 1) {
      set_have(have_ - 1);
      moral_ = "fed";
      say({"The {animal} was hungry, so {H} gave it one {thing}.",
           "{H} gave one {thing} to the {animal}."});
      say({"The {look} {animal} ate it, and {he} had {n} left.", "Now {he} had {n things}."});
    } else {
      say({"{H} was not afraid and sat down beside it.",
           "\"Do not be afraid,\" {he} said to the {animal}."});
      say({"The {look} {animal} let {him} stroke its back.",
           "The {look} {animal} stayed near {him}."});
    }
  }

  void lose() {
    moral_ = "lost";
    say({"Then {H} could not find {his} {gear}.", "\"Where is my {gear}?\" asked {H}."});
    say({"{He} looked {spot2}, but it was not there.",
         "It was not {spot2}, and it was not in the {box}."});
    say({"{F} looked {spot3} and found the {gear}.", "At last {he} found the {gear} {spot3}."});
  }

  void compare() {
    if (theirs_ == 0) theirs_ = random_.between(1, 8);
    set_count("m", theirs_);
    say({"{F} counted {fhis} own {things} and had {m}.", "{F} showed {him} {m things}."});
    if (theirs_ == have_)
      say({"Both of them had the same.", "{H} had {n} too, so they had the same."});
    if (theirs_ < have_)
      say({"{H} had {n}, and that was more.", "{F} had fewer than {H}, who had {n}."});
    if (theirs_ > have_)
      say({"{H} had {n}, and that was fewer.", "{F} had more than {H}, who had {n}."});
  }

  void ask() {
    say({"\"How many {things} do you have?\" asked {F}.",
         "{F} wanted to know what was in the {color} {box}."});
    say({"\"I have {n things},\" said {H}.", "\"There are {n things} in my {box},\" {he} said."});
  }

  void next_day() {
    say({"In the evening {H} went home to {his} {kin}.",
         "It got dark, and {H} said good night to {F}."});
    day_ = (day_ + 1) % kDays.size();
    set("day", kDays[day_]);
    set_weather();
    say({"The next day was {day}, and it was {weather}.", "On {day} {why}."});
    say({"{H} took {his} {gear} and went {to} again.",
         "So {he} came back with {his} {gear} and the {color} {box}."});
  }

  void ending() {
    say({"When {H} came home, {his} {kin} opened the door.",
         "At the end of {day} {H} walked home to {his} {kin}.",
         "{His} {kin} was waiting at home for {H}."});
    say({"{He} had {n things} in the {color} {box}.", "\"Look, {n things}!\" said {H}.",
         "{He} put away the {gear} and showed {n things}."});
    if (animal_)
      say({"{He} told {his} {kin} about the {look} {animal}.",
           "\"I met a {look} {animal},\" {he} said."});
    if (moral_ == "shared")
      say({"It is good to share with a friend.", "{H} was happy, because {he} had helped {F}."});
    if (moral_ == "fed")
      say({"{He} was glad that the {animal} was not hungry.",
           "Be kind to animals, and they will trust you."});
    if (moral_ == "lost")
      say({"Who looks long enough will find.", "From then on {he} always kept {his} {gear} near."});
    if (moral_.empty())
      say({"It was a good {day} for a {trait} {girl}.", "That night {H} slept well {home}."});
  }

  StoryRandom random_;
  std::map<std::string, std::string, std::less<>> facts_;
  std::string text_;
  Noun noun_{};
  size_t day_ = 0;
  int have_ = 0, theirs_ = 0;
  bool animal_ = false;
  std::string_view moral_;
};

}  // namespace

uint64_t StoryRandom::next() {
  state_ += 0x9E3779B97F4A7C15u;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

size_t StoryRandom::below(size_t n) {
  check(n > 0, "story random: below(0)");
  return static_cast<size_t>(((next() >> 32) * static_cast<uint64_t>(n)) >>
                             32);  // n is far below 2^32
}

uint64_t story_seed(uint64_t seed, StorySplit split, uint64_t index) {
  // Split and index fill disjoint bits and SplitMix64 is a bijection: within one seed no story seed
  // comes twice.
  return StoryRandom(StoryRandom(seed).next() ^ (static_cast<uint64_t>(split) << 56) ^ index)
      .next();
}

std::string make_story(uint64_t seed) { return Teller(seed).tell(); }

std::string make_stories(uint64_t seed, StorySplit split, size_t bytes) {
  std::string out;
  for (uint64_t i = 0; out.size() < bytes; ++i)
    out += make_story(story_seed(seed, split, i)) + "\n\n";
  return out;
}

}  // namespace omq
