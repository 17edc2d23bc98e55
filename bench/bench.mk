# Benchmarks. They need an idle machine, and two cores for the proxies; bench-instructions needs neither.
#
#   make bench                  everything but bench-instructions
#   make bench-instructions     instructions per request, by source file, per chunk, prompt and line (NEXUS=path measures another
#                               binary; CHECK=1 fails 2 % above bench/instructions.json, WRITE=1 sets it)
#   make bench-metrics          the cost of recording a request and of rendering a line, beside prometheus-cpp
#   make bench-proxy            Nexus beside a blind forwarder, nginx and HAProxy: one table
#   make bench-proxy QUICK=1    each part once and short, to see that everything works
#   make bench-proxy WRITE=1    also writes bench/RESULTS.md and bench/results.svg
#   make bench-affinity         sessions over four replicas with a cache of prompts, beside HAProxy's consistent hash: bench/AFFINITY.md
#   make bench-proxy ONLY=small,streams   some parts alone (small half large streams idle calls start threads tls tls-idle stalls)

HELP_MORE += 'make bench        every benchmark; make bench-proxy: beside nginx and HAProxy (QUICK=1, WRITE=1, ONLY=parts)'
HELP_MORE += 'make bench-instructions   instructions per request, by source file (NEXUS=path measures another binary)'

QUICK ?=
WRITE ?=
ONLY ?=
NEXUS ?=

BENCH := $(B)/bench
BENCH_TOOLS := $(addprefix $(BENCH)/,blind sse_backend sse_client start_time wake_time)
BENCH_PACKAGES := $(strip \
  $(call lacks,/usr/sbin/nginx,nginx-light) $(call lacks,/usr/sbin/haproxy,haproxy) $(call lacks_command,wrk,wrk) \
  $(call lacks_command,strace,strace) $(call lacks_command,valgrind,valgrind) $(call lacks_command,$(NODE),nodejs) \
  $(call lacks,/usr/include/prometheus/registry.h,prometheus-cpp-dev))
BENCH_DEPS := $(if $(BUILD_PACKAGES)$(BENCH_PACKAGES),deps-bench)

COUNTER_PACKAGES := $(strip $(call lacks_command,wrk,wrk) $(call lacks_command,valgrind,valgrind) $(call lacks_command,$(NODE),nodejs))
COUNTER_DEPS := $(if $(COUNTER_PACKAGES),deps-counter)

.PHONY: deps-bench deps-counter
deps-bench: | $(BUILD_DEPS)
	@tools/packages.sh $(BENCH_PACKAGES)
deps-counter: | $(BUILD_DEPS)
	@tools/packages.sh $(COUNTER_PACKAGES)

$(BENCH)/%: $(B)/obj/bench/%.o
	@mkdir -p $(@D)
	$(CXX) $(LDFLAGS_ALL) $^ -o $@

$(B)/obj/bench/metrics_bench.o: | $(BENCH_DEPS)
$(BENCH)/metrics_bench: $(B)/obj/bench/metrics_bench.o
	@mkdir -p $(@D)
	$(CXX) -pthread $(LDFLAGS) $^ -lprometheus-cpp-core -o $@

# One after the other: they would disturb each other.
.PHONY: bench bench-metrics bench-proxy
bench: bench-metrics
	@$(MAKE) --no-print-directory bench-proxy

bench-metrics: $(BENCH)/metrics_bench
	@$< $(if $(QUICK),1)

# The daemon with line numbers.
$(B)/obj/bench/nexus.o: LEVEL := -g1
$(B)/obj/bench/nexus.o: nexus.cpp $(B)/flags | $(READY)
	@mkdir -p $(@D)
	$(compile)
$(BENCH)/nexus: $(B)/obj/bench/nexus.o $(LIBS)
	@mkdir -p $(@D)
	$(link)

.PHONY: bench-instructions
bench-instructions: $(BENCH)/sse_backend $(BENCH)/sse_client $(if $(NEXUS),,$(BENCH)/nexus) | $(COUNTER_DEPS)
	@$(NODE) bench/instructions.mjs --nexus $(or $(NEXUS),$(BENCH)/nexus) --bin $(BENCH) $(if $(CHECK),--check) $(if $(WRITE),--write)

bench-proxy: $(B)/nexus $(BENCH_TOOLS) | $(BENCH_DEPS)
	@$(NODE) bench/proxy_bench.mjs --nexus $(B)/nexus --bin $(BENCH) --only '$(ONLY)' $(if $(QUICK),--quick) $(if $(WRITE),--write)

.PHONY: bench-affinity
bench-affinity: $(B)/nexus | $(BENCH_DEPS)
	@$(NODE) bench/affinity.mjs --nexus $(B)/nexus $(if $(QUICK),--quick)
