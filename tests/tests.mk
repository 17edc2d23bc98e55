# The simulation (tests/sim): `make sim SEEDS=1..1000`; a part of `make test`, with a fixed set of seeds.

SEEDS ?= 1..2000# of make sim: FIRST..LAST; TRACE=1 tells the run of one seed in words
HELP_MORE += 'make sim          the gateway on a simulated network: SEEDS=1..2000; with one seed TRACE=1 tells the run'

.PHONY: sim
$(B)/sim: $(B)/obj/tests/sim/main.o $(B)/obj/tests/sim/memory.o $(LIBS) $(B)/flags
	$(link) -Wl,--wrap=malloc

sim: $(B)/sim
	$(B)/sim $(SEEDS)

test: $(B)/sim
