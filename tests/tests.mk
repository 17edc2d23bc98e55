# The programs that `make test` runs beside the daemon: the unit tests and the simulator.

ifneq ($(NO_TLS),)
ifneq ($(filter test unit% sim,$(MAKECMDGOALS)),)
$(error The tests speak TLS: run them without TLS=no)
endif
endif

# ---- unit tests ------------------------------------------------------------------------------------------------------

# Compiled as two sources, because reading the headers costs more than compiling a test. `make unit-text` compiles
# tests/text_test.cpp alone. Tests that compute much are compiled at -O1; for the others that costs more than it saves.
UNIT_MUCH := $(wildcard $(addprefix tests/,buffer_test.cpp fuzz_corpus_test.cpp hostile_*_test.cpp labels_test.cpp usage_scan_test.cpp))
UNIT_LITTLE := $(filter-out tests/main_test.cpp $(UNIT_MUCH),$(sort $(wildcard tests/*_test.cpp)))
JOINED := $(addprefix $(B)/obj/tests/joined/,little much)
UNIT_OBJECTS := $(JOINED:=.o) $(B)/obj/tests/hostile/gateway.o $(B)/obj/tests/main_test.o

.PHONY: unit unit-%
unit: $(B)/unit_tests
	$(B)/unit_tests $(UNIT)

unit-%: $(B)/alone/%
	$< $(UNIT)

$(B)/unit_tests: $(UNIT_OBJECTS) $(LIBS) $(B)/flags
	$(link)

$(B)/alone/%: $(B)/obj/tests/%_test.o $(B)/obj/tests/main_test.o $(LIBS)
	@mkdir -p $(@D)
	$(link)
$(addprefix $(B)/alone/,bounds fuzz_corpus hostile_answers hostile_reload hostile_reload_keys hostile_requests worker): $(B)/obj/tests/hostile/gateway.o

# _FORTIFY_SOURCE warns where nothing is optimised. The release has no _GLIBCXX_ASSERTIONS, because of their cost.
# A char is unsigned in the unit tests, as on ARM64, and signed elsewhere on x86-64: nothing may depend on it.
$(B)/obj/tests/%_test.o $(B)/obj/tests/joined/%.o: LEVEL := -funsigned-char -O0 -U_FORTIFY_SOURCE -D_GLIBCXX_ASSERTIONS
$(B)/obj/tests/main_test.o $(B)/obj/tests/joined/much.o $(UNIT_MUCH:%.cpp=$(B)/obj/%.o): LEVEL := -funsigned-char -O1 -D_GLIBCXX_ASSERTIONS
$(B)/obj/tests/hostile/gateway.o: LEVEL := -funsigned-char -O1 -D_GLIBCXX_ASSERTIONS
$(B)/obj/tests/sim/main.o: LEVEL := -O1 -D_GLIBCXX_ASSERTIONS

# Written anew by each make, and replaced only if it has changed: a test file or an include came or went.
$(B)/obj/tests/joined/much.cpp: FILES := $(UNIT_MUCH)
$(B)/obj/tests/joined/little.cpp: FILES := $(UNIT_LITTLE)
$(JOINED:=.cpp): FORCE
	@mkdir -p $(@D)
	@tests/join.sh $(FILES) >$@.new
	@$(replace)
$(JOINED:=.o): %.o: %.cpp $(B)/flags | $(READY)
	$(compile)

$(UNIT_OBJECTS) $(patsubst %.cpp,$(B)/obj/%.o,$(UNIT_MUCH) $(UNIT_LITTLE)): | $(TEST_DEPS)
.PRECIOUS: $(B)/alone/% $(B)/obj/%.o

# ---- the simulator: `make sim SEEDS=1..1000`; `make test` runs it with a fixed set of seeds ---------------------------

SEEDS ?= 1..2000
HELP_MORE += 'make sim          the gateway on a simulated network: SEEDS=1..2000; TRACE=1 with one seed prints its events'

.PHONY: sim
$(B)/sim: $(B)/obj/tests/sim/main.o $(B)/obj/tests/sim/faults.o $(LIBS) $(B)/flags
	$(link) -Wl,--wrap=malloc

sim: $(B)/sim
	$(B)/sim $(SEEDS)
