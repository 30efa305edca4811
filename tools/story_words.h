// The words of the story grammar: who, where, what. Plain tables, read by story_grammar.cpp alone.
#pragma once

#include <array>
#include <string_view>

namespace omq::story {

struct Person {
  std::string_view name;
  bool girl;
};
struct Noun {
  std::string_view one, many;
  bool food;
};
// Where a story plays. What can be found there, and where one looks for it, is for the model to
// learn.
struct Place {
  std::string_view at, to;  // "in the garden", "to the garden"
  std::array<Noun, 3> finds;
  std::array<std::string_view, 3> spots;  // "under a bush"
};
struct Weather {
  std::string_view word, gear, why;  // rainy days ask for the umbrella
};
struct Family {
  std::string_view who, home;  // "grandmother", "in a small house"
};

inline constexpr std::array kPeople = {
    Person{"Anna", true},   Person{"Mia", true},   Person{"Lily", true},  Person{"Rosa", true},
    Person{"Ella", true},   Person{"Nora", true},  Person{"Clara", true}, Person{"Ivy", true},
    Person{"Ruth", true},   Person{"Zoe", true},   Person{"Emma", true},  Person{"Hanna", true},
    Person{"Tom", false},   Person{"Ben", false},  Person{"Max", false},  Person{"Leo", false},
    Person{"Sam", false},   Person{"Finn", false}, Person{"Jack", false}, Person{"Paul", false},
    Person{"Oscar", false}, Person{"Hugo", false}, Person{"Adam", false}, Person{"Noah", false},
};

inline constexpr std::array kPlaces = {
    Place{"in the garden",
          "to the garden",
          {{{"tomato", "tomatoes", true}, {"carrot", "carrots", true}, {"rose", "roses", false}}},
          {"under a bush", "behind the fence", "near the gate"}},
    Place{"in the forest",
          "to the forest",
          {{{"berry", "berries", true}, {"acorn", "acorns", false}, {"leaf", "leaves", false}}},
          {"under a tall tree", "behind a rock", "beside the path"}},
    Place{
        "at the beach",
        "to the beach",
        {{{"shell", "shells", false}, {"stone", "stones", false}, {"feather", "feathers", false}}},
        {"in the sand", "near the water", "under an old boat"}},
    Place{"at the market",
          "to the market",
          {{{"apple", "apples", true}, {"cake", "cakes", true}, {"candle", "candles", false}}},
          {"on a table", "behind a cart", "near the baker"}},
    Place{"on the farm",
          "to the farm",
          {{{"egg", "eggs", true}, {"pear", "pears", true}, {"potato", "potatoes", true}}},
          {"in the barn", "beside the well", "under the wagon"}},
    Place{"by the lake",
          "to the lake",
          {{{"lily", "lilies", false}, {"stone", "stones", false}, {"nut", "nuts", true}}},
          {"on the shore", "under the bridge", "in the tall grass"}},
    Place{"on the hill",
          "up the hill",
          {{{"flower", "flowers", false},
            {"cherry", "cherries", true},
            {"mushroom", "mushrooms", true}}},
          {"at the top", "between two rocks", "under a small tree"}},
    Place{"at the school",
          "to the school",
          {{{"pencil", "pencils", false}, {"book", "books", false}, {"coin", "coins", false}}},
          {"on a shelf", "under the desk", "near the window"}},
    Place{"at the castle",
          "to the castle",
          {{{"key", "keys", false}, {"ring", "rings", false}, {"bell", "bells", false}}},
          {"on the stairs", "behind the tower", "in the yard"}},
    Place{"by the river",
          "to the river",
          {{{"pebble", "pebbles", false}, {"plum", "plums", true}, {"reed", "reeds", false}}},
          {"on the bank", "under the willow", "beside the ferry"}},
    Place{"in the village",
          "to the village",
          {{{"ribbon", "ribbons", false}, {"bun", "buns", true}, {"button", "buttons", false}}},
          {"near the fountain", "on a bench", "behind the inn"}},
    Place{"at the harbor",
          "to the harbor",
          {{{"cork", "corks", false}, {"rope", "ropes", false}, {"lemon", "lemons", true}}},
          {"on the pier", "behind a barrel", "in an empty net"}},
};

inline constexpr std::array kWeather = {
    Weather{"sunny", "hat", "the sun was strong"},
    Weather{"rainy", "umbrella", "the rain was heavy"},
    Weather{"cold", "coat", "the air was like ice"},
    Weather{"windy", "scarf", "the wind was loud"},
    Weather{"foggy", "lamp", "the fog was thick"},
    Weather{"snowy", "sled", "the snow was deep"},
    Weather{"stormy", "cloak", "the storm was wild"},
};

inline constexpr std::array kFamily = {
    Family{"mother", "in a small house"},
    Family{"father", "near the old mill"},
    Family{"grandmother", "at the end of the road"},
    Family{"uncle", "in a village by the sea"},
    Family{"sister", "above a shop"},
    Family{"brother", "next to the bakery"},
    Family{"aunt", "behind the church"},
    Family{"grandfather", "on a green island"},
};

inline constexpr std::array<std::string_view, 7> kDays = {
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"};
inline constexpr std::array<std::string_view, 13> kNumbers = {
    "no",    "one",   "two",  "three", "four",   "five",  "six",
    "seven", "eight", "nine", "ten",   "eleven", "twelve"};
inline constexpr std::array<std::string_view, 8> kTraits = {"brave",    "kind", "quiet",  "clever",
                                                            "cheerful", "shy",  "gentle", "bold"};
inline constexpr std::array<std::string_view, 10> kColors = {
    "red", "blue", "green", "yellow", "white", "black", "brown", "gray", "pink", "purple"};
inline constexpr std::array<std::string_view, 6> kBoxes = {"basket", "bag",  "box",
                                                           "bucket", "sack", "pot"};
inline constexpr std::array<std::string_view, 10> kAnimals = {
    "dog", "cat", "fox", "rabbit", "duck", "goat", "hen", "lamb", "donkey", "squirrel"};
inline constexpr std::array<std::string_view, 6> kLooks = {"little", "young", "thin",
                                                           "funny",  "lame",  "sleepy"};

}  // namespace omq::story
