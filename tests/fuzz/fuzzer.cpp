// One fuzz target for libFuzzer. tests/fuzz.mk selects it: -include tests/fuzz/NAME.h -DFUZZ_TARGET=NAME
#include <cstddef>
#include <cstdint>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  fuzz::FUZZ_TARGET({reinterpret_cast<const char*>(data), bytes});
  return 0;
}
