# `make soak MINUTES=10`: load, faults, reloads and scrapes together against the built daemon, and what is left of it after.
MINUTES ?= 10

.PHONY: soak
soak: $(B)/nexus $(DEPS)/test-packages
	@$(NODE) tests/soak/soak.mjs --nexus $(B)/nexus --minutes $(MINUTES)

HELP_MORE += 'make soak         load, faults, reloads and scrapes together for MINUTES=10; what was lost or grew is a failure'
