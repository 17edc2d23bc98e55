# `make fuzz SECONDS=60` builds each fuzz target with AddressSanitizer and UBSan, and runs one after the other for that long.
# It writes its findings to build/fuzz/finds. `make test` replays every file in tests/fuzz/corpus/TARGET.

SECONDS ?= 60
FUZZ := build/fuzz
FUZZ_CXX ?= clang++
FUZZ_CC ?= clang
FUZZ_SAN := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_FLAGS := -std=c++20 $(FUZZ_SAN) -D_GLIBCXX_ASSERTIONS $(INCLUDES) -pthread

# TARGET:HEADER: the function fuzz::TARGET is in tests/fuzz/HEADER.h
FUZZ_TARGETS := config:config request_head:heads response_head:heads chunked:chunked request_body:body model_list:body \
  incremental_json:incremental_json multipart:multipart usage:usage dialects:dialects \
  label_page:labels exchange:exchange answer:exchange
fuzz_name = $(word 1,$(subst :, ,$(1)))
fuzz_header = tests/fuzz/$(word 2,$(subst :, ,$(1))).h
fuzz_more = $(if $(filter %:exchange,$(1)),tests/hostile/gateway.cpp)
FUZZ_PROGRAMS := $(foreach t,$(FUZZ_TARGETS),$(FUZZ)/$(call fuzz_name,$(t)))
FUZZ_OBJECTS := $(LIBS:$(B)/deps/%=$(FUZZ)/obj/%)

$(FUZZ)/obj/%.o: $(LLHTTP)/%.c | $(READY)
	@mkdir -p $(@D)
	$(FUZZ_CC) $(FUZZ_SAN) -fsanitize=fuzzer-no-link -w -DLLHTTP_STRICT_MODE=1 $(INCLUDES) -c $< -o $@

$(FUZZ)/obj/simdjson.o: $(SIMDJSON)/simdjson.cpp | $(READY)
	@mkdir -p $(@D)
	$(FUZZ_CXX) -std=c++20 -O1 -g -w -fsanitize=address -I$(SIMDJSON) -c $< -o $@

define fuzz_program
$(FUZZ)/$(call fuzz_name,$(1)): tests/fuzz/fuzzer.cpp $(call fuzz_header,$(1)) $(FUZZ_OBJECTS) \
  $(wildcard nexus/*.h nexus/*/*.h tests/*.h tests/*/*.h tests/hostile/*.cpp)
	$(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=fuzzer -include $(call fuzz_header,$(1)) \
	  -DFUZZ_TARGET=$(call fuzz_name,$(1)) tests/fuzz/fuzzer.cpp $(call fuzz_more,$(1)) $(FUZZ_OBJECTS) $(LDLIBS) -o $$@
endef
$(foreach t,$(FUZZ_TARGETS),$(eval $(call fuzz_program,$(t))))

.PHONY: fuzz fuzz-coverage
fuzz: $(FUZZ_PROGRAMS)
	@tests/fuzz/run.sh $(FUZZ) $(SECONDS) $(foreach t,$(FUZZ_TARGETS),$(call fuzz_name,$(t)))

# Lines of the parsers that the corpora and the hostile rows reach, by clang's source-based coverage.
fuzz-coverage: $(LIBS)
	@tests/fuzz/coverage.sh $(FUZZ) '$(FUZZ_CXX)' '$(INCLUDES)'

HELP_MORE += 'make fuzz         each fuzz target for SECONDS=60, sanitised; make fuzz-coverage: lines that the corpora reach'
