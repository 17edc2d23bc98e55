# Nexus: `make run` builds it and serves a demonstration, `make test` runs every test, `make help` lists the rest.
#
# All that is fetched or built goes to build/. `make dev` builds in build/dev, quickly and without optimisation; SAN=address
# and SAN=thread build with a sanitiser in build/address and build/thread. Only `make deps` and `make deps-…` call apt.

# As many jobs as cores, unless -j on the command line says otherwise.
MAKEFLAGS += $(if $(filter 0,$(MAKELEVEL)),-j$(shell nproc)) --no-builtin-rules
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.SUFFIXES:

# ---- what a user may set ---------------------------------------------------------------------------------------------

DEV ?=
TLS ?= yes# no: without OpenSSL, half the size; for hosts where another proxy speaks TLS
CROSS ?=# aarch64-linux-gnu builds for ARM64 in build/aarch64-linux-gnu; its tests run under qemu-user-static
# clang++ needs half of g++'s time to compile the daemon at -O0.
ifeq ($(origin CXX),default)
CXX := $(if $(CROSS),$(CROSS)-g++,$(if $(DEV),$(if $(shell command -v clang++),clang++,g++),g++))
endif
ifeq ($(origin CC),default)
CC := $(if $(findstring clang,$(CXX)),$(subst clang++,clang,$(CXX)),$(subst g++,gcc,$(CXX)))
endif
SAN ?=
PREFIX ?= /usr/local
DESTDIR ?=
NODE ?= node
CLANG_FORMAT ?= clang-format
MAINTAINER ?= The Nexus maintainers <nexus@example.org>
E2E ?=# arguments for tests/e2e/run.mjs
UNIT ?=# arguments for the unit tests, for instance UNIT='-tc=*deadline*'

# ---- directories and flags -------------------------------------------------------------------------------------------

# What makes an error in memory end the process instead of giving it away. CONTRIBUTING.md has the cost of each.
MACHINE := $(firstword $(subst -, ,$(or $(shell $(CXX) -dumpmachine 2>/dev/null),$(CROSS),$(shell uname -m))))
HARDENING := -fPIE -fstack-protector -fstack-clash-protection -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3
HARDENING += $(if $(filter x86_64,$(MACHINE)),-fcf-protection) $(if $(filter aarch64,$(MACHINE)),-mbranch-protection=standard)
# clang before 18 has no -fstack-clash-protection for ARM64, and warns of it.
HARDENING += $(if $(findstring clang,$(CXX)),-Wno-unused-command-line-argument)
HARDENING := $(strip $(HARDENING))
HARDENED_LINK := -static-pie -Wl,-z,relro,-z,now,-z,noexecstack

NO_TLS := $(filter no,$(TLS))
DEPS := build/deps
SIMDJSON := $(DEPS)/simdjson
# The libraries of another architecture, and nothing here that the machine's own compiler does not find by itself.
FOREIGN := $(if $(CROSS),$(DEPS)/$(CROSS)/usr)
# Debian 13 and later have llhttp as a library; Debian 12 has its C sources, in a package of Node's.
LLHTTP := $(if $(wildcard /usr/include/llhttp.h),,/usr/share/llhttp)
LLHTTP_SOURCES := $(if $(LLHTTP),$(addprefix $(LLHTTP)/,api.c http.c llhttp.c))

ifneq ($(DEV),)
  B := build/dev
  OPTIMISE := -O0 -g1
  LINK_MODE := -static
else ifeq ($(SAN),)
  B := build$(CROSS:%=/%)
  OPTIMISE := -O3 $(HARDENING)
  LINK_MODE := $(HARDENED_LINK)
# Without vptr: its check opens a pipe, so it cries wolf in the test that leaves no descriptor. Nothing here is virtual.
else ifeq ($(SAN),address)
  B := build/address
  OPTIMISE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS
  LINK_MODE := -fsanitize=address,undefined
else ifeq ($(SAN),thread)
  B := build/thread
  OPTIMISE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=thread -D_GLIBCXX_ASSERTIONS
  LINK_MODE := -fsanitize=thread
else
  $(error SAN=$(SAN): give SAN=address, SAN=thread, or nothing)
endif

WARNINGS := -Wall -Wextra -Wconversion -Werror
# What a sanitiser adds makes gcc 12 see members of a moved variant as unset (its manual says so of -Wmaybe-uninitialized).
WARNINGS += $(if $(SAN),$(if $(findstring clang,$(CXX)),,-Wno-maybe-uninitialized))
LLHTTP_INCLUDES := $(if $(LLHTTP),-isystem /usr/share/include -isystem /usr/share/include/llhttp)
INCLUDES := -I. -isystem $(SIMDJSON) $(LLHTTP_INCLUDES) $(foreach root,$(FOREIGN),-isystem $(root)/include -isystem $(root)/include/$(CROSS))
# simdjson has other members where a file is not optimised, unless told: objects of several levels are linked together.
CXXFLAGS_ALL := -std=c++20 $(OPTIMISE) $(WARNINGS) -pthread -DSIMDJSON_DEVELOPMENT_CHECKS=0 $(NO_TLS:%=-DNEXUS_NO_TLS) $(INCLUDES) $(CXXFLAGS)
THIRD_PARTY := $(patsubst -fstack-protector,-fstack-protector-strong,$(OPTIMISE)) -w -DLLHTTP_STRICT_MODE=1
LDFLAGS_ALL := $(LINK_MODE) -pthread $(FOREIGN:%=-L%/lib/$(CROSS)) $(LDFLAGS)
# The option for a static library that OpenSSL may need, if it is here: from Debian 13 on. Asked when it links.
if_static = $(if $(filter /%,$(shell $(CXX) $(FOREIGN:%=-B%/lib/$(CROSS)) -print-file-name=lib$(1).a 2>/dev/null)),-l$(1))
OPENSSL = $(if $(NO_TLS),,-lssl -lcrypto $(call if_static,z) $(call if_static,zstd))
LDLIBS = $(if $(LLHTTP),,-lllhttp) -lcares $(OPENSSL)

# ---- Debian packages -------------------------------------------------------------------------------------------------

# The package $(2) if the file, or the command, $(1) is not there.
lacks = $(if $(wildcard $(1)),,$(2))
lacks_command = $(if $(shell command -v $(1)),,$(2))

# Debian 13's OpenSSL needs them in a static program, Debian 12's does not.
ZSTD_PACKAGES := $(if $(filter 12.%,$(shell cat /etc/debian_version 2>/dev/null)),,$(call lacks,/usr/include/zlib.h,zlib1g-dev) $(call lacks,/usr/include/zstd.h,libzstd-dev))
EMULATOR := $(if $(CROSS),qemu-$(firstword $(subst -, ,$(CROSS)))-static)
NPM_PACKAGES := $(call lacks_command,npm,npm) $(call lacks,/etc/ssl/certs/ca-certificates.crt,ca-certificates)
BUILD_PACKAGES := $(strip \
  $(call lacks_command,$(CXX),$(if $(CROSS),g++-$(CROSS),$(subst clang++,clang,$(notdir $(firstword $(CXX)))))) \
  $(if $(LLHTTP),$(call lacks,$(LLHTTP)/llhttp.c,libllhttp-dev|node-llhttp)) \
  $(call lacks,/usr/include/ares.h,libc-ares-dev) \
  $(if $(NO_TLS),,$(call lacks,/usr/include/openssl/ssl.h,libssl-dev) $(ZSTD_PACKAGES)) \
  $(if $(wildcard $(SIMDJSON)/simdjson.cpp),,$(NPM_PACKAGES)))
TEST_PACKAGES := $(strip \
  $(call lacks,/usr/include/doctest/doctest.h,doctest-dev) \
  $(if $(CROSS),$(call lacks_command,$(EMULATOR),qemu-user-static)) \
  $(call lacks_command,$(NODE),nodejs) $(call lacks_command,mandoc,mandoc) $(call lacks_command,openssl,openssl) $(NPM_PACKAGES))
# Programs that some tests run beside Nexus: such a test is skipped, with a line, where its program is missing.
PEER_PACKAGES = $(strip \
  $(call lacks_command,curl,curl) $(call lacks_command,prometheus,prometheus) $(call lacks_command,chromium,chromium) $(call lacks_command,jq,jq) \
  $(call lacks,/usr/sbin/nginx,nginx-light) $(call lacks,/usr/sbin/haproxy,haproxy) \
  $(call lacks,/usr/lib/python3/dist-packages/prometheus_client,python3-prometheus-client) \
  $(call lacks_command,clang-format,clang-format))

# Prerequisites of whatever is built, and of whatever a test needs: empty if nothing is missing.
BUILD_DEPS := $(if $(BUILD_PACKAGES),deps)
TEST_DEPS := $(if $(BUILD_PACKAGES)$(TEST_PACKAGES),deps)

.PHONY: deps deps-peers
deps:
	@tools/packages.sh $(patsubst %,'%',$(sort $(BUILD_PACKAGES) $(TEST_PACKAGES)))

# The llhttp that is installed decides the rules below: make reads them again once there is one.
ifneq ($(if $(MAKE_RESTARTS),,$(filter-out clean deps deps-% format help lint size,$(or $(MAKECMDGOALS),all))),)
ifneq ($(findstring llhttp,$(BUILD_PACKAGES)),)
include $(DEPS)/installed.mk
$(DEPS)/installed.mk: deps
	@mkdir -p $(@D)
	@touch $@
endif
endif

deps-peers: | $(TEST_DEPS)
	@tools/packages.sh --optional $(PEER_PACKAGES)

# ---- simdjson, from npm, against a pinned digest ---------------------------------------------------------------------

$(SIMDJSON)/simdjson.cpp: tools/fetch-simdjson.sh | $(BUILD_DEPS)
	@tools/fetch-simdjson.sh $(SIMDJSON)
$(SIMDJSON)/simdjson.h: $(SIMDJSON)/simdjson.cpp ;

# ---- the status page's files as a header ------------------------------------------------------------------------------

STATUS_FILES := build/gen/status_files.h
STATUS_PAGE := nexus/apps/page/status
$(STATUS_FILES): tools/embed.sh $(STATUS_PAGE).html $(STATUS_PAGE).css $(STATUS_PAGE).js
	@mkdir -p $(@D)
	@tools/embed.sh kStatusPage=$(STATUS_PAGE).html kStatusStyle=$(STATUS_PAGE).css kStatusScript=$(STATUS_PAGE).js >$@

READY := $(BUILD_DEPS) $(SIMDJSON)/simdjson.h $(STATUS_FILES) $(FOREIGN:%=%/include/openssl/ssl.h)

$(FOREIGN:%=%/include/openssl/ssl.h): | $(BUILD_DEPS)
	@tools/fetch-cross.sh $(CROSS) $(DEPS)/$(CROSS)
	@touch $@

# ---- objects ---------------------------------------------------------------------------------------------------------

# A change of compiler or flags compiles everything anew.
FLAGS := $(strip $(CXX) $(CXXFLAGS_ALL) / $(CC) $(CFLAGS) / $(LDFLAGS_ALL))
FLAGS_BEFORE := $(strip $(if $(wildcard $(B)/flags),$(file <$(B)/flags)))# make 4.3 may leave the line's end there
$(B)/flags: $(if $(subst x$(FLAGS_BEFORE),,x$(FLAGS)),FORCE)
	@mkdir -p $(@D)
	@printf '%s\n' '$(FLAGS)' >$@
FORCE:

LIBS := $(patsubst $(LLHTTP)/%.c,$(B)/deps/%.o,$(LLHTTP_SOURCES)) $(B)/deps/simdjson.o

$(B)/deps/%.o: $(LLHTTP)/%.c $(B)/flags | $(READY)
	@mkdir -p $(@D)
	$(CC) $(THIRD_PARTY) $(CFLAGS) $(LLHTTP_INCLUDES) -c $< -o $@

# The sources of llhttp come with a package, maybe while make runs. Named one by one: make removes what a pattern made.
$(LLHTTP_SOURCES): | $(BUILD_DEPS) ;

$(B)/deps/simdjson.o: $(SIMDJSON)/simdjson.cpp $(B)/flags | $(READY)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 $(THIRD_PARTY) $(CXXFLAGS) -I$(SIMDJSON) -c $< -o $@

compile = $(CXX) $(CXXFLAGS_ALL) $(LEVEL) -MMD -MP -c $< -o $@

$(B)/obj/%.o: %.cpp $(B)/flags | $(READY)
	@mkdir -p $(@D)
	$(compile)

# Puts the new text of a target into its place, unless it is the same as before.
replace = if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# tests/tests.mk and bench/bench.mk use $(B), $(LIBS), $(B)/obj/%.o of any .cpp file, $(compile), $(link) and $(replace).
link = tools/link.sh $(CXX) $(LDFLAGS_ALL) $(filter %.o,$^) $(LDLIBS) -o $@

# ---- the daemon ------------------------------------------------------------------------------------------------------

.PHONY: all run dev single
all: $(B)/nexus

$(B)/nexus: $(B)/obj/nexus.o $(LIBS)
	$(link) $(if $(SAN)$(DEV),,-s)

run: $(B)/nexus
	@exec $(B)/nexus --demo

dev:
	@command -v clang++ >/dev/null || echo 'make dev: clang++ is not installed; with it this takes half the time'
	@$(MAKE) --no-print-directory DEV=1 build/dev/nexus

# There the headers of the system and the libraries are compiled once, but for those of one architecture, which saves a fifth
# of each later build.
ifneq ($(DEV),)
$(B)/obj/system.h: FORCE
	@mkdir -p $(@D)
	@grep -rhoE '^#include <.*>' nexus nexus.cpp | grep -vE 'arm_neon|immintrin' | sort -u >$@.new
	@$(replace)
$(B)/obj/system.h.gch: $(B)/obj/system.h $(B)/flags | $(READY)
	$(CXX) $(CXXFLAGS_ALL) $(if $(findstring clang,$(CXX)),-fpch-instantiate-templates) -MD -MP -x c++-header $< -o $@
$(B)/obj/nexus.o: LEVEL := -include $(B)/obj/system.h
$(B)/obj/nexus.o: $(B)/obj/system.h.gch
endif

# The daemon as one source file, with this command in its first lines. (g++ forgets "-x c" after each file.)
SINGLE := build/nexus.single
SINGLE_COMMAND = $(CXX) -std=c++20 -O3 -w $(NO_TLS:%=-DNEXUS_NO_TLS) $(HARDENING) $(HARDENED_LINK) -pthread -DSIMDJSON_DEVELOPMENT_CHECKS=0 -DLLHTTP_STRICT_MODE=1 \
  -I$(SIMDJSON) $(LLHTTP_INCLUDES:-isystem=-I) $(SINGLE).cpp $(SIMDJSON)/simdjson.cpp \
  $(if $(LLHTTP),$(addprefix -x c ,$(LLHTTP_SOURCES)) -x none) $(LDLIBS) -o $(SINGLE)
single: $(READY)
	@tools/single.sh nexus.cpp '$(strip $(SINGLE_COMMAND))' >$(SINGLE).cpp

# ---- tests -----------------------------------------------------------------------------------------------------------

.PHONY: test
$(DEPS)/test-modules: tests/package.json tests/package-lock.json | $(TEST_DEPS)
	cd tests && npm ci --no-audit --no-fund --loglevel=error
	@mkdir -p $(@D)
	@touch $@

test: $(B)/nexus $(B)/unit_tests $(B)/sim $(DEPS)/test-modules
	@NODE='$(NODE)' SAN='$(SAN)' EMULATOR='$(EMULATOR)' tests/run.sh $(B) $(UNIT) -- $(E2E)

# ---- looking after the source ----------------------------------------------------------------------------------------

.PHONY: lint format size clean help
lint:
	@CLANG_FORMAT='$(CLANG_FORMAT)' tools/lint.sh

size:
	@tools/size.sh

format:
	@$(CLANG_FORMAT) -i $$(git ls-files "*.h" "*.cpp")

# Keeps build/deps, which came over the network; `rm -r build` removes that too.
clean:
	find build -mindepth 1 -maxdepth 1 ! -name deps -exec rm -rf {} +
	rm -f build/deps/*.o

# ---- installing ------------------------------------------------------------------------------------------------------

.PHONY: install uninstall deb tarball
VERSION = $(shell sed -n 's/^constexpr std::string_view kVersion = "\(.*\)";.*/\1/p' nexus/base/text.h)
BINDIR := $(DESTDIR)$(PREFIX)/bin
MANDIR := $(DESTDIR)$(PREFIX)/share/man
DOCDIR := $(DESTDIR)$(PREFIX)/share/doc/nexus
UNITDIR := $(DESTDIR)$(PREFIX)/lib/systemd/system

install: $(B)/nexus
	install -d $(BINDIR) $(MANDIR)/man5 $(MANDIR)/man8 $(DOCDIR) $(UNITDIR)
	install -m 755 $(B)/nexus $(BINDIR)/nexus
	install -m 644 man/nexus.8 $(MANDIR)/man8/nexus.8
	install -m 644 man/nexus.conf.5 $(MANDIR)/man5/nexus.conf.5
	install -m 644 nexus.conf.example docs/runbook.md $(DOCDIR)
	sed 's,/usr/bin/nexus,$(PREFIX)/bin/nexus,' contrib/systemd/nexus.service >$(UNITDIR)/nexus.service
	chmod 644 $(UNITDIR)/nexus.service
	install -m 644 contrib/systemd/nexus.socket $(UNITDIR)/nexus.socket

uninstall:
	rm -f $(BINDIR)/nexus $(MANDIR)/man8/nexus.8 $(MANDIR)/man5/nexus.conf.5 $(UNITDIR)/nexus.service $(UNITDIR)/nexus.socket
	rm -f $(DOCDIR)/nexus.conf.example $(DOCDIR)/runbook.md
	-rmdir $(DOCDIR) 2>/dev/null || true

deb tarball: $(B)/nexus
	@VERSION='$(VERSION)' MACHINE='$(MACHINE)' MAINTAINER='$(MAINTAINER)' CXX='$(CXX)' tools/$@.sh

help:
	@echo 'make              build build/nexus; installs or names what is missing, as make deps does'
	@echo 'make TLS=no       the same without TLS (OpenSSL), less than half the size'
	@echo 'make run          build, then serve a demonstration on 127.0.0.1:8000'
	@echo 'make test         build and run every test; SAN=address or SAN=thread for a sanitised build'
	@echo 'make dev          build build/dev/nexus quickly: not optimised, with line numbers'
	@echo 'make unit         the unit tests alone (UNIT="-tc=*name*" picks); make unit-text: tests/text_test.cpp alone'
	@echo 'make lint         check formatting, manuals and house rules; make format: format the C++'
	@echo 'make single       the whole daemon as one source file, build/nexus.single.cpp'
	@echo 'make size         lines, files, longest file and function, arrows between folders'
	@echo 'make deps         install the missing Debian packages; make deps-peers: also nginx, HAProxy, Prometheus, Chromium, jq'
	@echo 'make install      PREFIX=/usr/local DESTDIR=; make uninstall: take it away again'
	@echo 'make deb          a Debian package in build/; make tarball: for hosts without Debian, to unpack in /usr/local'
	@echo 'make clean        remove what was built'
	@$(if $(HELP_MORE),printf '%s\n' $(HELP_MORE))

# Fragments add targets of their own, with a line each for help: HELP_MORE += 'make bench        …'
-include bench/bench.mk tests/tests.mk tests/fuzz.mk tests/soak.mk tests/night.mk tests/mutants.mk
-include $(shell find $(B)/obj -name '*.d' 2>/dev/null)
