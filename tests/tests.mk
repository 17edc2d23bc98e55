# The programs that `make test` runs besides the daemon: the unit tests and the simulation.

# ---- unit tests ------------------------------------------------------------------------------------------------------

# Compiled several to one object, for most of what a test costs is the headers that all of them read; `make unit-text`
# compiles tests/text_test.cpp alone. Tests that do much are optimised, a little: for the others it takes longer
# than it saves.
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
$(addprefix $(B)/alone/,fuzz_corpus hostile_answers hostile_requests worker): $(B)/obj/tests/hostile/gateway.o

$(B)/obj/tests/%_test.o $(B)/obj/tests/joined/%.o: LEVEL := -O0
$(B)/obj/tests/main_test.o $(B)/obj/tests/joined/much.o $(UNIT_MUCH:%.cpp=$(B)/obj/%.o): LEVEL := -O1
$(B)/obj/tests/hostile/gateway.o $(B)/obj/tests/sim/main.o: LEVEL := -O1

$(B)/obj/tests/joined/much.cpp: $(UNIT_MUCH)
$(B)/obj/tests/joined/little.cpp: $(UNIT_LITTLE)
$(JOINED:=.cpp): tests/join.sh $(B)/joined
	@mkdir -p $(@D)
	@tests/join.sh $(filter %.cpp,$^) >$@
$(JOINED:=.o): %.o: %.cpp $(B)/flags | $(READY)
	$(compile)

# A test file that came or went joins them anew.
JOINED_BEFORE := $(strip $(if $(wildcard $(B)/joined),$(file <$(B)/joined)))
$(B)/joined: $(if $(subst x$(JOINED_BEFORE),,x$(strip $(UNIT_MUCH) $(UNIT_LITTLE))),FORCE)
	@mkdir -p $(@D)
	@echo '$(UNIT_MUCH) $(UNIT_LITTLE)' >$@

$(UNIT_OBJECTS) $(patsubst %.cpp,$(B)/obj/%.o,$(UNIT_MUCH) $(UNIT_LITTLE)): | $(DEPS)/test-packages
.PRECIOUS: $(B)/alone/% $(B)/obj/%.o

# ---- the simulation: `make sim SEEDS=1..1000`; a part of `make test`, with a fixed set of seeds -----------------------

SEEDS ?= 1..2000# of make sim: FIRST..LAST; TRACE=1 tells the run of one seed in words
HELP_MORE += 'make sim          the gateway on a simulated network: SEEDS=1..2000; with one seed TRACE=1 tells the run'

.PHONY: sim
$(B)/sim: $(B)/obj/tests/sim/main.o $(B)/obj/tests/sim/faults.o $(LIBS) $(B)/flags
	$(link) -Wl,--wrap=malloc

sim: $(B)/sim
	$(B)/sim $(SEEDS)
