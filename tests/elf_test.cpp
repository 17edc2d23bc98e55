// elf_test.cpp
// Goal:   the daemon is built with every protection that the compiler and the linker offer.
// Method: reads the ELF headers of the daemon beside this program, and of the object files that it was linked from.
#include <doctest/doctest.h>
#include <elf.h>
#include <link.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "nexus/os/seccomp.h"

namespace {

class Elf {
 public:
  explicit Elf(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    REQUIRE_MESSAGE(bytes_.compare(0, SELFMAG, ELFMAG) == 0, path.string());
    header = at<ElfW(Ehdr)>(0);
  }

  template <class T>
  T at(std::size_t offset) const {
    T value{};
    REQUIRE(offset + sizeof value <= bytes_.size());
    std::memcpy(&value, bytes_.data() + offset, sizeof value);
    return value;
  }

  std::vector<ElfW(Phdr)> segments(std::optional<unsigned> type = {}) const {
    std::vector<ElfW(Phdr)> found;
    for (unsigned i = 0; i < header.e_phnum; ++i) {
      const auto segment = at<ElfW(Phdr)>(header.e_phoff + i * sizeof(ElfW(Phdr)));
      if (!type || segment.p_type == *type) found.push_back(segment);
    }
    return found;
  }

  // All values of `tag` in the dynamic section, joined by "or".
  ElfW(Xword) dynamic(ElfW(Sxword) tag, bool* has = nullptr) const {
    ElfW(Xword) value = 0;
    for (const ElfW(Phdr) & segment : segments(PT_DYNAMIC)) {
      for (std::size_t at_byte = 0; at_byte < segment.p_filesz; at_byte += sizeof(ElfW(Dyn))) {
        const auto entry = at<ElfW(Dyn)>(segment.p_offset + at_byte);
        if (entry.d_tag != tag) continue;
        value |= entry.d_un.d_val;
        if (has != nullptr) *has = true;
      }
    }
    return value;
  }

  // The bits of GNU_PROPERTY_X86_FEATURE_1_AND or GNU_PROPERTY_AARCH64_FEATURE_1_AND in the sections; 0 without that
  // note.
  std::uint32_t branch_protection() const {
    const std::uint32_t kind = header.e_machine == EM_X86_64 ? 0xc0000002 : 0xc0000000;
    for (unsigned i = 0; i < header.e_shnum; ++i) {
      const auto section = at<ElfW(Shdr)>(header.e_shoff + i * sizeof(ElfW(Shdr)));
      if (section.sh_type != SHT_NOTE || section.sh_size < 16) continue;
      const auto note = at<ElfW(Nhdr)>(section.sh_offset);
      if (note.n_type != NT_GNU_PROPERTY_TYPE_0) continue;
      const std::size_t begin = section.sh_offset + sizeof note + 4;  // "GNU" and its NUL
      for (std::size_t at_byte = 0; at_byte + 8 < note.n_descsz;) {
        const auto type = at<std::uint32_t>(begin + at_byte);
        const auto size = at<std::uint32_t>(begin + at_byte + 4);
        if (type == kind) return at<std::uint32_t>(begin + at_byte + 8);
        at_byte += 8 + (size + 7) / 8 * 8;
      }
    }
    return 0;
  }

  bool names(const std::string& symbol) const { return bytes_.find(symbol) != std::string::npos; }

  ElfW(Ehdr) header{};

 private:
  std::string bytes_;
};

// The folder of the build, or nothing if there is no hardened daemon in it.
std::optional<std::filesystem::path> build_folder() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  for (const auto& folder : {self.parent_path(), self.parent_path().parent_path()}) {
    const bool is_release = !nexus::sandbox::kSanitised && folder.filename() != "dev";
    if (is_release && std::filesystem::exists(folder / "nexus")) return folder;
  }
  MESSAGE("skipped: no released build of nexus beside this program");
  return std::nullopt;
}

TEST_CASE("the daemon is a static program at a random address, and nothing in it is both writable and executable") {
  const auto folder = build_folder();
  if (!folder) return;
  const Elf elf(*folder / "nexus");
  CHECK(elf.header.e_type == ET_DYN);
  CHECK(elf.segments(PT_INTERP).empty());
  bool needs_library = false, has_text_relocations = false;
  elf.dynamic(DT_NEEDED, &needs_library);
  elf.dynamic(DT_TEXTREL, &has_text_relocations);
  CHECK_FALSE(needs_library);
  CHECK_FALSE(has_text_relocations);
  for (const ElfW(Phdr) & segment : elf.segments()) CHECK((segment.p_flags & (PF_W | PF_X)) != (PF_W | PF_X));
  REQUIRE(elf.segments(PT_GNU_STACK).size() == 1);
  CHECK((elf.segments(PT_GNU_STACK)[0].p_flags & PF_X) == 0);
}

TEST_CASE("the daemon's tables of addresses are read-only once it runs") {
  const auto folder = build_folder();
  if (!folder) return;
  const Elf elf(*folder / "nexus");
  CHECK(elf.segments(PT_GNU_RELRO).size() == 1);
  CHECK((elf.dynamic(DT_FLAGS) & DF_BIND_NOW) != 0);
  CHECK((elf.dynamic(DT_FLAGS_1) & DF_1_NOW) != 0);
  CHECK((elf.dynamic(DT_FLAGS_1) & DF_1_PIE) != 0);
}

TEST_CASE("all that is compiled here checks its stack and its indirect branches, and the daemon its buffers") {
  const auto folder = build_folder();
  if (!folder) return;
  const Elf daemon(*folder / "obj/nexus.o");
  std::vector<std::filesystem::path> objects{*folder / "obj/nexus.o"};
  for (const auto& entry : std::filesystem::directory_iterator(*folder / "deps")) {
    if (entry.path().extension() == ".o") objects.push_back(entry.path());
  }
  CHECK(objects.size() >= 2);  // simdjson, and llhttp where it is compiled here
  if (daemon.header.e_machine == EM_X86_64 || daemon.header.e_machine == EM_AARCH64) {
    // IBT and SHSTK, or BTI and PAC. The linker keeps the bits that each object has, also those of the system's
    // libraries.
    for (const auto& object : objects) CHECK_MESSAGE(Elf(object).branch_protection() == 3, object.string());
  }
  CHECK(daemon.names("__stack_chk_fail"));
  CHECK(daemon.names("__memcpy_chk"));
}

}  // namespace
