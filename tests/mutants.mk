# `make mutants`: builds a copy of the project that has every row of tests/mutants/*.txt in it, a small wrong change each,
# and tells which of them the tests notice. Takes hours; fails if they notice fewer than 95 of 100.
#   make mutants ONLY=nexus/proxy    the rows whose number, file or reason has this text
#   make mutants EVERY=12            each twelfth row: a sample
#   make mutants PARTS=sim           some parts of the tests alone; by default sim, unit and then e2e, each for those that are left

MUTANTS := build/mutants/copy
PARTS ?= sim,unit,e2e
EVERY ?= 1

.PHONY: mutants mutants-build
mutants-build: $(READY) $(DEPS)/test-modules
	@rm -rf $(MUTANTS)/nexus $(MUTANTS)/tests
	@mkdir -p $(MUTANTS)/build
	@git ls-files -z --cached --others --exclude-standard | xargs -0 cp -p --parents -t $(MUTANTS)
	@ln -sfn $(abspath tests/node_modules) $(MUTANTS)/tests/node_modules
	@rm -rf $(MUTANTS)/build/deps && cp -a $(DEPS) $(MUTANTS)/build/
	@$(NODE) tests/mutants/mutants.mjs apply $(MUTANTS)
	@[ ! -f $(MUTANTS)/Makefile ] || $(MAKE) --no-print-directory -C $(MUTANTS) CXXFLAGS='-include tests/mutants/mutant.h' build/unit_tests build/sim build/nexus

mutants: mutants-build
	@$(NODE) tests/mutants/mutants.mjs run $(MUTANTS) --only '$(ONLY)' --every '$(EVERY)' --parts '$(PARTS)' $(MUTANT_ARGS)

HELP_MORE += 'make mutants      which of many small wrong changes the tests notice: ONLY=nexus/proxy, EVERY=12, PARTS=sim'
