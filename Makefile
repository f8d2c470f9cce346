# Spaceweave. `make help` lists the targets.

PREFIX  ?= /usr/local
BINDIR  ?= $(PREFIX)/bin
SBINDIR ?= $(PREFIX)/sbin
LIBDIR  ?= $(PREFIX)/lib
INCDIR  ?= $(PREFIX)/include
MANDIR  ?= $(PREFIX)/share/man
COMPDIR ?= $(PREFIX)/share/bash-completion/completions
DESTDIR ?=

VERSION := 0.1
CC      ?= cc
BUILD   ?= build$(if $(SAN),-$(subst $(comma),-,$(SAN)))
comma   := ,
V       ?= 0
Q       := $(if $(filter 1,$(V)),,@)
say      = $(if $(filter 1,$(V)),,@printf '  %-5s %s\n' '$(1)' '$(patsubst $(BUILD)/%,%,$(2))')

PKGS    := fuse3 libxxhash blkid uuid
WARN    := -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith
OPT     ?= -O2 -g
CPPFLAGS += -I. -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -DSPACEWEAVE_VERSION='"$(VERSION)"' $(if $(DEBUG),-DLOCK_DEBUG)
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
FS_LIB    := $(filter-out fs/fuse.c fs/mount.c,$(wildcard fs/*.c))
CLI_SRC   := $(wildcard tools/cli.c)
FSCK_SRC  := $(wildcard tools/fsck.c tools/pass*.c tools/problem.c)
VERB_SRC  := $(filter-out $(CLI_SRC) $(FSCK_SRC),$(wildcard tools/*.c))
MKFS_SRC  := $(wildcard mkfs/*.c)
TEST_SRC  := $(wildcard tests/test_*.c tests/crash_*.c)
TEST_LIB  := $(filter-out $(TEST_SRC),$(wildcard tests/*.c))
SRC       := $(wildcard alloc/*.c meta/*.c fs/*.c mkfs/*.c tools/*.c tests/*.c tests/bench/*.c tests/mnt/*.c)

CORE  := $(BUILD)/lib/libspaceweave.a
ALLOC := $(BUILD)/lib/libspaceweave-alloc.a
BIN   := $(BUILD)/bin
PROGS := $(if $(VERB_SRC),$(BIN)/spaceweave) $(if $(wildcard fs/mount.c),$(BIN)/mount.spaceweave) \
         $(if $(MKFS_SRC),$(BIN)/mkfs.spaceweave) $(if $(FSCK_SRC),$(BIN)/fsck.spaceweave)
TESTS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(TEST_SRC))

LIBS  = $(shell pkg-config --libs libxxhash)

.PHONY: all
all: $(ALLOC) $(BUILD)/lib/libspaceweave-alloc.so $(CORE) $(PROGS)		## build everything (default)

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

$(BUILD)/lib/libspaceweave-alloc.so: $(call obj,$(ALLOC_SRC))
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(CFLAGS) $(LDFLAGS) -shared -Wl,-soname,libspaceweave-alloc.so.0 -o $@ $^ $(LIBS)

$(CORE): $(call obj,$(ALLOC_SRC) $(META_SRC) $(FS_LIB))
	$(call say,AR,$@)
	$(Q)mkdir -p $(@D) && rm -f $@ && $(AR) rcs $@ $^

define program
$(BIN)/$(1): $(call obj,$(2)) $(CORE)
	$$(call say,LD,$$@)
	$$(Q)mkdir -p $$(@D) && $$(CC) $$(CFLAGS) $$(LDFLAGS) -o $$@ $$^ $$(LIBS) $(3)
endef
$(eval $(call program,mount.spaceweave,fs/fuse.c fs/mount.c $(CLI_SRC),$$(shell pkg-config --libs fuse3)))
$(eval $(call program,mkfs.spaceweave,$(MKFS_SRC) $(CLI_SRC),$$(shell pkg-config --libs blkid uuid)))
$(eval $(call program,fsck.spaceweave,$(FSCK_SRC) $(CLI_SRC)))
$(eval $(call program,spaceweave,$(VERB_SRC) $(CLI_SRC)))

$(BUILD)/tests/%: $(BUILD)/tests/%.o $(call obj,$(TEST_LIB)) $(CORE)
	$(call say,LD,$@)
	$(Q)mkdir -p $(@D) && $(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LIBS) $(shell pkg-config --libs cmocka)

.PHONY: unit
unit: $(TESTS)		## build and run the tests that need no mount
	$(Q)fail=0; for t in $(TESTS); do echo "== $$t"; $$t || fail=1; done; exit $$fail

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

-include $(patsubst %.c,$(BUILD)/%.d,$(SRC))
