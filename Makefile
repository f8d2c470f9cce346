# Spaceweave. `make help` lists the targets.

PREFIX  ?= /usr/local
BINDIR  ?= $(PREFIX)/bin
SBINDIR ?= $(PREFIX)/sbin
LIBDIR  ?= $(PREFIX)/lib
INCDIR  ?= $(PREFIX)/include
MANDIR  ?= $(PREFIX)/share/man
COMPDIR ?= $(PREFIX)/share/bash-completion/completions
# mount(8) and fsck(8) look for their helpers in /sbin alone.
HELPERS ?= $(if $(filter /usr/local,$(PREFIX)),/sbin,$(SBINDIR))
DESTDIR ?=

VERSION := 0.1
CC      ?= cc
# One folder for each kind of build, so that none is mixed up with another.
BUILD   ?= build$(if $(SAN),-$(subst $(comma),-,$(SAN)))$(if $(DEBUG),-debug)
comma   := ,
V       ?= 0
Q       := $(if $(filter 1,$(V)),,@)
say      = $(if $(filter 1,$(V)),,@printf '  %-5s %s\n' '$(1)' '$(patsubst $(BUILD)/%,%,$(2))')

WARN    := -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith \
           $(if $(findstring clang,$(CC)),-Wno-gnu-variable-sized-type-not-at-end)
OPT     ?= -O2 -g
DEFS    := -I. -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -DSPACEWEAVE_VERSION='"$(VERSION)"'
CPPFLAGS += $(DEFS) $(if $(DEBUG),-DLOCK_DEBUG)
CFLAGS  += -std=gnu11 $(OPT) $(WARN) -fPIC -pthread -fvisibility=default
LDFLAGS += -pthread
ifneq ($(SAN),)
CFLAGS  += -fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all
LDFLAGS += -fsanitize=$(SAN)
CPPFLAGS += -DLOCK_DEBUG
endif

obj = $(patsubst %.c,$(BUILD)/%.o,$(1))

ALLOC_SRC := $(wildcard alloc/*.c)
META_SRC  := $(wildcard meta/*.c)
FS_LIB    := $(filter-out fs/fuse.c fs/mount.c fs/ring.c fs/waiter.c,$(wildcard fs/*.c))
CLI_SRC   := $(wildcard tools/cli.c)
FSCK_SRC  := $(wildcard tools/fsck.c tools/pass*.c tools/problem.c tools/fsck_*.c)
VERB_SRC  := $(filter-out $(CLI_SRC) $(FSCK_SRC),$(wildcard tools/*.c))
MKFS_SRC  := $(wildcard mkfs/*.c)
TEST_SRC  := $(wildcard tests/test_*.c tests/crash_*.c)
TEST_LIB  := $(filter-out $(TEST_SRC),$(wildcard tests/*.c))
AID_SRC   := $(filter-out tests/fsck/call.c,$(wildcard tests/mnt/*.c tests/fsck/*.c))
SRC       := $(wildcard alloc/*.c meta/*.c fs/*.c mkfs/*.c tools/*.c tests/*.c tests/bench/*.c tests/mnt/*.c tests/fsck/*.c)

CORE  := $(BUILD)/lib/libspaceweave.a
ALLOC := $(BUILD)/lib/libspaceweave-alloc.a
SHARED := $(BUILD)/lib/libspaceweave-alloc.so
BIN   := $(BUILD)/bin
PROGS := $(BIN)/spaceweave $(if $(wildcard fs/mount.c),$(BIN)/mount.spaceweave) \
         $(BIN)/mkfs.spaceweave $(if $(FSCK_SRC),$(BIN)/fsck.spaceweave)
TESTS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(TEST_SRC))
AIDS  := $(patsubst %.c,$(BUILD)/%,$(AID_SRC))
FUZZ_TARGETS := super journal node raw fsck state
FUZZ_PROGS   := $(patsubst %,$(BUILD)/fuzz-%,$(FUZZ_TARGETS))

# Debian's names of what a build, a mount, and the tests need.
NEED_BUILD := gcc libc6-dev make pkgconf libfuse3-dev liburing-dev libxxhash-dev libblkid-dev uuid-dev
NEED_RUN   := fuse3
NEED_CHECK := libcmocka-dev rsync git sqlite3 attr acl
NEED_LINT  := clang clang-tidy cppcheck
NEED       := sh tools/need.sh

LIBS  = $(shell pkg-config --libs libxxhash)

.PHONY: all
all: $(ALLOC) $(SHARED) $(CORE) $(PROGS)		## build everything (default)

$(BUILD)/%.o: %.c
	$(call say,CC,$@)
	$(Q)mkdir -p $(@D)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(CFLAGS_$(subst /,_,$*)) -MMD -MP -c -o $@ $<

FUSE_CFLAGS := $(shell pkg-config --cflags fuse3 2>/dev/null)
CFLAGS_fs_fuse = $(FUSE_CFLAGS)
CFLAGS_fs_mount = $(FUSE_CFLAGS)

$(ALLOC): $(call obj,$(ALLOC_SRC))
	$(call say,AR,$@)
	$(Q)mkdir -p $(@D) && rm -f $@ && $(AR) rcs $@ $^

$(SHARED): $(call obj,$(ALLOC_SRC))
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(CFLAGS) $(LDFLAGS) -shared -Wl,-soname,$(@F).0 -o $@ $^ $(LIBS)
	$(Q)ln -sf $(@F) $@.0

$(CORE): $(call obj,$(ALLOC_SRC) $(META_SRC) $(FS_LIB))
	$(call say,AR,$@)
	$(Q)mkdir -p $(@D) && rm -f $@ && $(AR) rcs $@ $^

define program
$(BIN)/$(1): $(call obj,$(2)) $(CORE)
	$$(call say,LD,$$@)
	$$(Q)mkdir -p $$(@D) && $$(CC) $$(CFLAGS) $$(LDFLAGS) -o $$@ $$^ $$(LIBS) $(3)
endef
$(eval $(call program,mount.spaceweave,fs/fuse.c fs/mount.c fs/ring.c fs/waiter.c $(CLI_SRC),$$(shell pkg-config --libs fuse3 liburing)))
$(eval $(call program,mkfs.spaceweave,$(MKFS_SRC) $(CLI_SRC),$$(shell pkg-config --libs blkid uuid)))
$(eval $(call program,fsck.spaceweave,$(FSCK_SRC) $(CLI_SRC)))
$(eval $(call program,spaceweave,$(VERB_SRC) $(CLI_SRC)))

# Memory that fails: tests/fault.c stands before the allocator's calls.
WRAP := $(foreach f,malloc calloc realloc aligned_alloc posix_memalign mmap64 pthread_create,-Wl,--wrap=$(f))

$(TESTS): $(BUILD)/tests/%: $(BUILD)/tests/%.o $(call obj,$(TEST_LIB)) $(CORE)
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(CFLAGS) $(LDFLAGS) $(WRAP) -o $@ $(filter %.o,$^) $(CORE) $(LIBS) \
		$(shell pkg-config --libs cmocka)

# fsck.spaceweave as a function, for tests that give it an image.
FSCK_CALL := $(call obj,$(filter-out tools/fsck.c,$(FSCK_SRC)) $(CLI_SRC) tests/fsck/call.c) \
	$(BUILD)/tools/fsck_call.o
$(BUILD)/tools/fsck_call.o: tools/fsck.c
	$(call say,CC,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(CPPFLAGS) $(CFLAGS) -Dmain=fsck_main -Wno-missing-prototypes -MMD -MP -c -o $@ $<
-include $(BUILD)/tools/fsck_call.d
$(BUILD)/tests/test_fsck: WRAP += -Wl,--wrap=image_open,--wrap=exit
$(BUILD)/tests/test_fsck: $(FSCK_CALL) | $(BUILD)/tests/fsck/damage

# Calls that can put a thread to sleep: it tells that it is about to.
$(BUILD)/tests/crash_between: WRAP += $(foreach f,pthread_mutex_lock pthread_rwlock_rdlock \
	pthread_rwlock_wrlock pthread_cond_wait sched_yield nanosleep,-Wl,--wrap=$(f))

# Programs that test scripts run: one file each.
$(AIDS): $(BUILD)/%: $(BUILD)/%.o $(CORE)
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LIBS)

.PHONY: run
run:		## build, format spaceweave.img and mount it on ./mnt
	@$(NEED) $(NEED_BUILD) $(NEED_RUN)
	@$(MAKE) --no-print-directory all
	@sh tools/run.sh $(BIN)

# ---- tests ----

# The long variants of what make check does on a real mount.
SOAK = { echo "== tests/mnt"; ROUNDS=$${ROUNDS:-200} bash tests/mnt/kill-daemon.sh && \
	IMAGES=$${IMAGES:-300} bash tests/mnt/damaged.sh && \
	FILES=0 bash tests/mnt/work-tree.sh && SIZE=4G TIMES=4 bash tests/mnt/full-volume.sh && \
	FILES=1000000 bash tests/mnt/mount-time.sh && FILES=1000000 bash tests/mnt/memory.sh; }
.PHONY: soak
soak: all $(AIDS)		## the long tests on a real mount alone
	$(Q)$(SOAK)

.PHONY: unit
unit: $(TESTS)		## build and run the tests that need no mount
	$(Q)tests/run $(TESTS)

.PHONY: tests
tests: all $(TESTS) $(AIDS) $(if $(findstring address,$(SAN)),$(FUZZ_PROGS))		## build the tests, run none

# The same tests once more under the sanitizers, and with ranks of locks checked
# (each of SAN and DEBUG does that).
SANS       := address,undefined thread
# One thread races with nobody: the long crash tests are left out there.
SAN_TESTS  := $(patsubst tests/%.c,build-address-undefined/tests/%,$(TEST_SRC)) \
	$(patsubst tests/%.c,build-thread/tests/%,$(filter-out tests/crash_ops.c tests/crash_random.c \
		tests/crash_recovery.c tests/test_fault.c tests/test_fsck.c tests/test_format.c \
		tests/test_simulator.c,$(TEST_SRC)))
MNT_TESTS  := $(filter-out tests/mnt/lib.sh,$(sort $(wildcard tests/mnt/*.sh)))
FSCK_TESTS := $(sort $(wildcard tests/fsck/[0-9]*/)) $(addprefix tests/fsck/,options.sh ask.sh undo.sh fuzz.sh)
CHECK_JOBS ?= 2
CHECK_TIME ?= 900

.PHONY: check
check:		## build and run every test
	@$(NEED) $(NEED_BUILD) $(NEED_RUN) $(NEED_CHECK)
	@$(MAKE) --no-print-directory -j$(CHECK_JOBS) tests
	@$(foreach s,$(SANS),$(MAKE) --no-print-directory -j$(CHECK_JOBS) SAN=$(s) tests &&) true
	@tests/run -j $(CHECK_JOBS) -t $(CHECK_TIME) $(TESTS) \
		$(SAN_TESTS) \
		$(FSCK_TESTS) tests/fuzz/run.sh $(MNT_TESTS)

.PHONY: crash
crash: tests		## every crash state there is, and soak; hours (STATES=n: about so many)
	$(Q)STATES=$(or $(STATES),0) tests/run -t 86400 $(filter $(BUILD)/tests/crash_% $(BUILD)/tests/test_fault $(BUILD)/tests/test_fsck,$(TESTS))
	$(Q)$(SOAK)

# Coverage-guided fuzzing: clang's libFuzzer, each target FUZZ_TIME seconds.
FUZZ_TIME    ?= 300
FUZZ_SAN     := -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
FUZZ_ASAN    := detect_leaks=0:max_malloc_fill_size=0:quarantine_size_mb=0:thread_local_quarantine_size_kb=0:allocator_release_to_os_interval_ms=-1
FUZZ_RUN     := -timeout=20 -rss_limit_mb=0 -close_fd_mask=3 -print_final_stats=1 -max_len=9000
.PHONY: fuzz
fuzz:		## fuzz each reader of the disk format (FUZZ_TIME=seconds each, FUZZ_TARGETS="node fsck")
	@$(NEED) $(NEED_BUILD) clang
	@$(MAKE) --no-print-directory CC=clang BUILD=build-fuzz OPT='-O1 -g $(FUZZ_SAN)' \
		$(patsubst %,build-fuzz/fuzz-%,$(FUZZ_TARGETS))
	@set -e; for t in $(FUZZ_TARGETS); do \
		mkdir -p build-fuzz/corpus/$$t build-fuzz/found; \
		(cd build-fuzz/corpus/$$t && ar x ../../../tests/fuzz/corpus/$$t.ar); \
		[ $$t = state ] || FUZZ_SEEDS=build-fuzz/corpus/$$t build-fuzz/fuzz-$$t; \
		echo "== $$t"; ASAN_OPTIONS=$(FUZZ_ASAN) build-fuzz/fuzz-$$t $(FUZZ_RUN) \
			-max_total_time=$(FUZZ_TIME) -artifact_prefix=build-fuzz/found/$$t- \
			build-fuzz/corpus/$$t 2>&1 | grep -E '^(==|stat|SUMMARY|fuzz:|#[0-9]*.*(DONE|pulse)|.*Test unit)'; done

# What is worth keeping of build-fuzz/corpus goes into the tree.
.PHONY: fuzz-keep
fuzz-keep:
	@set -e; for t in $(FUZZ_TARGETS); do \
		rm -rf build-fuzz/kept; mkdir -p build-fuzz/kept/all build-fuzz/kept/named; \
		ASAN_OPTIONS=$(FUZZ_ASAN) build-fuzz/fuzz-$$t $(FUZZ_RUN) -merge=1 \
			build-fuzz/kept/all build-fuzz/corpus/$$t >build-fuzz/merge.log 2>&1; \
		n=0; for f in build-fuzz/kept/all/*; do \
			n=$$((n + 1)); mv "$$f" build-fuzz/kept/named/$$(printf %04d $$n); done; \
		rm -f tests/fuzz/corpus/$$t.ar; \
		(cd build-fuzz/kept/named && ar rcDS ../../../tests/fuzz/corpus/$$t.ar *); \
		echo "$$t: $$n inputs"; done

# Compilers without libFuzzer run what they are given.
FUZZ_MAIN := $(if $(findstring clang,$(CC)),-fsanitize=fuzzer,tests/fuzz/main.c)
FUZZ_WRAP := -Wl,--wrap=random64
FUZZ_SRC  := $(filter tests/fuzz/main.c,$(FUZZ_MAIN))

$(BUILD)/fuzz-fsck: FUZZ_WRAP += -Wl,--wrap=image_open,--wrap=exit
$(BUILD)/fuzz-fsck: $(FSCK_CALL)
# Its calls of the disk are macros that are nothing.
$(BUILD)/fuzz-state: private CFLAGS += -Wno-unused-value
$(BUILD)/fuzz-state: tests/fuzz/state.c $(FUZZ_SRC) $(call obj,$(filter-out alloc/state.c,$(ALLOC_SRC)))
	$(call say,LD,$@)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $< $(FUZZ_MAIN) $(filter %.o,$^)
$(BUILD)/fuzz-%: tests/fuzz/fuzz.c $(FUZZ_SRC) $(CORE)
	$(call say,LD,$@)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) $(FUZZ_WRAP) \
		-DFUZZ_TARGET=FUZZ_$* -DFUZZ_$*_ALONE \
		-o $@ $< $(FUZZ_MAIN) $(filter %.o,$^) $(CORE) $(LIBS)

.PHONY: coverage
coverage:		## which lines and branches the tests reach: is it 95 and 85 %?
	@$(NEED) $(NEED_BUILD) $(NEED_CHECK) gcovr
	@$(MAKE) --no-print-directory BUILD=build-coverage OPT='-O0 -g --coverage' -j2 tests
	-@STATES=400 tests/run -j2 -t 1800 $(COVER_LONG:%=build-coverage/tests/%)
	-@SPACEWEAVE_BIN=$(CURDIR)/build-coverage/bin SPACEWEAVE_HELPERS=$(CURDIR)/build-coverage/tests/mnt \
		SPACEWEAVE_DAMAGE=$(CURDIR)/build-coverage/tests/fsck/damage tests/run -j2 \
		$(filter-out $(COVER_LONG:%=build-coverage/tests/%),$(TESTS:$(BUILD)/%=build-coverage/%)) \
		$(FSCK_TESTS) $(MNT_COVER)
	@tests/coverage.sh build-coverage

# A larger share of the calls fails here than in make check.
COVER_LONG := test_fault test_fsck
# A killed daemon's counts are lost, nobody may not write them.
MNT_COVER := $(patsubst %,tests/mnt/%.sh,bad-input damaged full-volume host-full memory options \
	posix-attributes posix-data posix-names posix-times programs readonly scrub two-hosts)

.PHONY: lint
lint: $(BUILD)/compile_commands.json		## what clang-tidy, cppcheck and shellcheck say
	@$(NEED) $(NEED_LINT) shellcheck
	$(Q)clang-tidy -p $(BUILD) --quiet $(LINT_SRC)
	$(Q)cppcheck --quiet --error-exitcode=1 --inline-suppr --std=c11 --library=posix \
		--enable=warning,performance,portability -j2 \
		--suppress=missingIncludeSystem --suppress=legacyUninitvar \
		--suppress=readdirCalled --suppress=invalidFunctionArg:alloc/* --suppress=invalidFunctionArg:fs/ring.c $(DEFS) $(LINT_SRC)
	$(Q)shellcheck -s bash -S warning -e SC1091,SC2154,SC2015,SC2034,SC2164 .ci/run tests/run tools/*.sh tests/mnt/*.sh tests/fuzz/run.sh $(wildcard tests/fsck/*.sh)

LINT_SRC := $(filter-out tests/%,$(SRC))

$(BUILD)/compile_commands.json: Makefile
	$(Q)mkdir -p $(@D)
	$(Q){ echo '['; sep=; for f in $(SRC); do \
		printf '%s{"directory": "%s", "file": "%s", "arguments": ["cc", ' "$$sep" "$(CURDIR)" "$$f"; \
		for a in $(DEFS) $(FUSE_CFLAGS) -std=gnu11 -Wall -Wextra; do \
			printf '"%s", ' "$$(printf '%s' "$$a" | sed 's/"/\\"/g')"; done; \
		printf '"-c", "%s"]}' "$$f"; sep=,; done; echo ']'; } >$@

# ---- install ----

MAN := $(wildcard mkfs/*.8 tools/*.8 fs/*.8)

.PHONY: install
install: all		## install under PREFIX (/usr/local), in DESTDIR
	install -d $(addprefix $(DESTDIR),$(BINDIR) $(SBINDIR) $(HELPERS) $(LIBDIR)/pkgconfig \
		$(INCDIR)/spaceweave $(MANDIR)/man3 $(MANDIR)/man8 $(COMPDIR))
	install -m 755 $(BIN)/spaceweave $(DESTDIR)$(BINDIR)
	install -m 755 $(filter-out %/spaceweave,$(PROGS)) $(DESTDIR)$(SBINDIR)
	set -e; for p in $(filter-out spaceweave,$(notdir $(PROGS))); do \
		[ $(HELPERS) = $(SBINDIR) ] || ln -sf $(SBINDIR)/$$p $(DESTDIR)$(HELPERS)/$$p; done
	ln -sf $(SBINDIR)/mount.spaceweave $(DESTDIR)$(HELPERS)/mount.fuse.spaceweave
	install -m 644 $(MAN) $(DESTDIR)$(MANDIR)/man8
	install -m 644 alloc/spaceweave-alloc.3 $(DESTDIR)$(MANDIR)/man3
	install -m 644 tools/completion.bash $(DESTDIR)$(COMPDIR)/spaceweave
	set -e; for p in mkfs fsck mount; do ln -sf spaceweave $(DESTDIR)$(COMPDIR)/$$p.spaceweave; done
	install -m 644 $(ALLOC) $(DESTDIR)$(LIBDIR)
	install -m 755 $(SHARED) $(DESTDIR)$(LIBDIR)/$(notdir $(SHARED)).$(VERSION)
	ln -sf $(notdir $(SHARED)).$(VERSION) $(DESTDIR)$(LIBDIR)/$(notdir $(SHARED)).0
	ln -sf $(notdir $(SHARED)).0 $(DESTDIR)$(LIBDIR)/$(notdir $(SHARED))
	install -m 644 alloc/alloc.h $(DESTDIR)$(INCDIR)/spaceweave
	sed -e 's|@PREFIX@|$(PREFIX)|; s|@LIBDIR@|$(LIBDIR)|; s|@INCDIR@|$(INCDIR)|; s|@VERSION@|$(VERSION)|' \
		alloc/spaceweave-alloc.pc.in >$(DESTDIR)$(LIBDIR)/pkgconfig/spaceweave-alloc.pc

.PHONY: uninstall
uninstall:		## remove what install put there
	rm -f $(addprefix $(DESTDIR)$(BINDIR)/,spaceweave) \
		$(addprefix $(DESTDIR)$(SBINDIR)/,$(filter-out spaceweave,$(notdir $(PROGS)))) \
		$(addprefix $(DESTDIR)$(HELPERS)/,$(filter-out spaceweave,$(notdir $(PROGS))) mount.fuse.spaceweave) \
		$(addprefix $(DESTDIR)$(MANDIR)/man8/,$(notdir $(MAN))) \
		$(DESTDIR)$(MANDIR)/man3/spaceweave-alloc.3 \
		$(addprefix $(DESTDIR)$(COMPDIR)/,spaceweave mkfs.spaceweave fsck.spaceweave mount.spaceweave) \
		$(DESTDIR)$(LIBDIR)/libspaceweave-alloc.a $(DESTDIR)$(LIBDIR)/libspaceweave-alloc.so* \
		$(DESTDIR)$(INCDIR)/spaceweave/alloc.h $(DESTDIR)$(LIBDIR)/pkgconfig/spaceweave-alloc.pc
	-rmdir $(DESTDIR)$(INCDIR)/spaceweave

CFLAGS_tests_bench_nullfs = $(FUSE_CFLAGS)
$(BUILD)/tests/bench/nullfs: $(call obj,tests/bench/nullfs.c)
	$(call say,LD,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(shell pkg-config --libs fuse3)
$(BUILD)/tests/bench/tree: $(call obj,tests/bench/tree.c) $(CORE)
	$(call say,LD,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/tests/bench/load: $(call obj,tests/bench/load.c)
	$(call say,LD,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^

.PHONY: bench
bench: all $(BUILD)/tests/bench/load $(BUILD)/tests/bench/nullfs		## compare with other file systems (QUICK=1: five minutes; BENCH="--help")
	$(Q)python3 tests/bench/bench.py --build $(BUILD) $(if $(QUICK),--quick) $(BENCH)

$(BUILD)/bench-alloc: $(BUILD)/tests/bench/bench-alloc.o $(ALLOC)
	$(call say,LD,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LIBS) -lm

.PHONY: bench-alloc
bench-alloc: $(BUILD)/bench-alloc		## measure the allocator and two stand-ins (QUICK=1: under a minute)
	$(Q)$(BUILD)/bench-alloc $(if $(QUICK),-q) -j $(BUILD)/bench-alloc.json

.PHONY: clean
clean:		## remove what was built
	rm -rf build build-*

.PHONY: help
help:		## this list
	@sed -n 's/^\([a-z-]*\):.*## */\1	/p' $(MAKEFILE_LIST) | expand -t 16

.SECONDARY:
-include $(patsubst %.c,$(BUILD)/%.d,$(SRC))
