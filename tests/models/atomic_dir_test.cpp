// Output that appears whole or not at all; and SHA-256 against published vectors.
#include "models/atomic_dir.h"

#include <doctest/doctest.h>

#include "models/hash.h"
#include "tests/models/files.h"

namespace omq {

namespace fs = std::filesystem;

TEST_CASE("atomic dir: appears only on commit") {
  TempDir dir;
  {
    AtomicDir out(dir / "model");
    out.write("config.json", "{}");
    CHECK_FALSE(fs::exists(dir / "model"));
    CHECK(out.path().string().find("model.partial-") != std::string::npos);
    CHECK(out.target() == dir / "model");
    out.commit();
    CHECK(contains(message_of([&] { out.commit(); }), "finished twice"));
  }
  CHECK(read_file(dir / "model/config.json") == "{}");
  CHECK(dir.entries() == 1);
}

TEST_CASE("atomic dir: without commit nothing stays") {
  TempDir dir;
  const std::string message = message_of([&] {
    AtomicDir out((dir / "model/").string() + "/");  // a slash at the end is no other folder
    fs::create_directory(out.path() / "sub");
    out.write("sub/x", "1");
    fail("something went wrong half-way");
  });
  CHECK(message == "something went wrong half-way");
  CHECK(dir.entries() == 0);
}

TEST_CASE("atomic dir: existing folders, missing parents, files in the way") {
  TempDir dir;
  fs::create_directory(dir / "there");
  write_file(dir / "there/notes.txt", "mine");
  write_file(dir / "file", "x");
  const auto refused = [&](const std::string& name, bool force) {
    return message_of([&] { AtomicDir out(dir / name, force); });
  };
  CHECK(contains(refused("there", false), "it exists; choose another name or pass --force"));
  CHECK(contains(refused("there", true), "not replaced even with --force"));
  CHECK(contains(refused("file", true), "a file of this name exists"));
  CHECK(contains(refused("none/model", false), "none does not exist"));
  CHECK(contains(message_of([] { AtomicDir out(""); }), "the name is empty"));
  CHECK(read_file(dir / "there/notes.txt") == "mine");
  CHECK(dir.entries() == 2);
}

TEST_CASE("atomic dir: force replaces an old model, and only on commit") {
  TempDir dir;
  fs::create_directory(dir / "model");
  write_file(dir / "model/config.json", "old");
  { AtomicDir abandoned(dir / "model", true); }
  CHECK(read_file(dir / "model/config.json") == "old");
  {
    AtomicDir out(dir / "model", true);
    out.write("config.json", "new");
    out.commit();
  }
  CHECK(read_file(dir / "model/config.json") == "new");
  fs::create_directory_symlink(dir / "model", dir / "link");
  {
    AtomicDir out(dir / "link", true);
    out.write("config.json", "newer");
    out.commit();
  }
  CHECK(fs::is_symlink(dir / "link"));
  CHECK(read_file(dir / "model/config.json") == "newer");
  CHECK(dir.entries() == 2);
}

TEST_CASE("atomic dir: the reason of a failed system call is the one that is told") {
  TempDir dir;
  const std::string name(250, 'x');  // ".partial-PID" makes it longer than a name may be
  CHECK(contains(message_of([&] { AtomicDir out(dir / name); }), "File name too long"));
  AtomicFile file(dir / "f");
  std::filesystem::create_directory(dir / "f");
  CHECK(contains(message_of([&] { file.commit(); }), "Is a directory"));
}

TEST_CASE("atomic dir: a parent without permission") {
  if (::geteuid() == 0) {
    MESSAGE("skipped: root may write everywhere");
    return;
  }
  TempDir dir;
  fs::permissions(dir.path(), fs::perms::owner_read | fs::perms::owner_exec);
  CHECK(contains(message_of([&] { AtomicDir out(dir / "model"); }), "Permission denied"));
  fs::permissions(dir.path(), fs::perms::owner_all);
}

TEST_CASE("atomic file: replaces on commit, keeps the old one otherwise") {
  TempDir dir;
  write_file(dir / "f", "old");
  { AtomicFile(dir / "f").write("half"); }
  CHECK(read_file(dir / "f") == "old");
  AtomicFile f(dir / "f");
  f.write("0123456789");
  f.write_at(2, std::as_bytes(std::span("XY", 2)));
  f.truncate(5);
  f.write("!");
  std::array<std::byte, 3> back{};
  f.read_at(2, back);
  CHECK(std::memcmp(back.data(), "XY4", 3) == 0);
  CHECK(contains(message_of([&] { f.read_at(5, back); }), "cannot read back"));
  f.commit();
  CHECK(read_file(dir / "f") == "01XY4!");
  CHECK(contains(message_of([&] { f.write("x"); }), "after it was finished"));
  CHECK(contains(message_of([&] { AtomicFile g(dir.path()); }), "a folder of this name exists"));
  CHECK(dir.entries() == 1);
}

TEST_CASE("sha256: published vectors, and any cutting into pieces") {
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  const std::string million(1'000'000, 'a');
  CHECK(sha256(million) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (const size_t piece : {1, 55, 63, 64, 65, 1000}) {
    Sha256 h;
    for (size_t i = 0; i < 5000; i += piece) {
      h.update(std::string_view(million).substr(i, std::min(piece, 5000 - i)));
    }
    CHECK(h.hex() == sha256(std::string_view(million).substr(0, 5000)));
  }
  TempDir dir;
  CHECK(sha256_file(write_file(dir / "f", "abc")) == sha256("abc"));
  CHECK(contains(message_of([&] { (void)sha256_file(dir / "none"); }), "cannot open"));
}

}  // namespace omq
