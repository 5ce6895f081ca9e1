# SPDX-License-Identifier: LGPL-2.1-or-later
#
#   make check    linters, types and every test that needs no virtual machine; a minute
#   make test     check, the package, and the tests in virtual machines; without KVM not the longest of these
#   make nightly  the same with all of them
#   make bench    the numbers
#   make demo     a whole host, from boot to shutdown, to look at
#   make deb      dist/vmcryptd_*.deb
#   make dist     dist/vmcryptd-VERSION.tar.gz
#   make release  VERSION=: checks, tests and tags a release
#   make docs     write the files anew that are generated from the code
#   make install  DESTDIR= PREFIX=/usr SYSCONFDIR=/etc
#
# On Debian, packages that are missing for this are installed, through sudo unless root; Python
# packages go into build/venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# The tests start many Pythons: none compiles what another has compiled.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := build/venv
RUN := $(VENV)/bin/python

.PHONY: all
all: man

# --- development ---

.PHONY: check lint types unit test nightly vm lint-deb bench demo deb dist release docs clean host-packages

host-packages:
	@packaging/install-host-packages packaging/host-packages $(wildcard packaging/image/host-packages)

$(VENV)/stamp: pyproject.toml | host-packages
	@echo "Python packages into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 is needed")'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --use-pep517 --editable '.[dev]'
	@touch $@

# The tests wait now and then, and the type checker uses one core: side by side they fill two.
check: $(VENV)/stamp
	@$(MAKE) --jobs --output-sync=target lint types unit

lint: $(VENV)/stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	shellcheck $(SHELL_SCRIPTS)

types: $(VENV)/stamp
	$(VENV)/bin/mypy

# Which bus library a host has is a matter of its Python. The tests that depend on it, marked bus_library, run with both.
unit: $(VENV)/stamp
	$(RUN) -m pytest -n 2 --cov --cov-report=
	VMCRYPTD_BUS_LIBRARY=dbus_fast $(RUN) -m pytest -n 2 -m bus_library tests/bus

test:
	$(MAKE) check
	$(MAKE) deb
	$(MAKE) lint-deb
	$(MAKE) vm

# A machine without KVM keeps one core busy. The modules that take longest come first. The rig's own tests are run
# when it has changed.
VM_JOBS ?= 2
LONGEST := $(addprefix tests/vm/test_,rotate.py keystore.py keys.py stacks.py boot.py faults.py secrets.py)
VM_TESTS := $(LONGEST) $(filter-out $(LONGEST) tests/vm/test_host.py,$(sort $(wildcard tests/vm/test_*.py)))
RIG := $(sort tests/vm/host.py tests/vm/guest.py tests/vm/test_host.py $(shell find packaging/image -type f))
RIG_STAMP = build/rig-$(shell cat $(RIG) | sha256sum | cut -c -12)

# Without KVM the machines are emulated, some twenty times slower. Tests that take minutes then, and whose kind others show,
# are marked `long`: there, only `make nightly` runs them.
nightly:
	$(MAKE) test ALL=yes

vm: $(VENV)/stamp
	$(RUN) -m pytest --timeout=1800 --durations=20 -n $(VM_JOBS) --dist loadfile --no-loadscope-reorder \
	    $(if $(ALL),--long) \
	    $(if $(wildcard $(RIG_STAMP)),,tests/vm/test_host.py) $(VM_TESTS)
	@rm -f build/rig-*; touch $(RIG_STAMP)

bench: $(VENV)/stamp
	$(RUN) -m tests.bench

demo: deb
	$(PYTHON) packaging/demo/run

docs: $(VENV)/stamp
	$(RUN) packaging/docs.py

deb: host-packages
	packaging/build-deb

VERSION_NOW := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' vmcryptd/__init__.py)

dist:
	@mkdir -p dist
	git archive --prefix=vmcryptd-$(VERSION_NOW)/ --output=dist/vmcryptd-$(VERSION_NOW).tar.gz HEAD
	@echo dist/vmcryptd-$(VERSION_NOW).tar.gz

release:
	packaging/release $(VERSION)

lint-deb: host-packages
	lintian --info --display-info --pedantic --allow-root --fail-on error,warning dist/*.deb

clean:
	rm -rf build/man build/venv build/pytest build/mypy build/ruff build/vmcryptd.egg-info dist

SHELL_SCRIPTS := .ci/run packaging/build-deb packaging/release $(wildcard packaging/debian/tests/simulated packaging/debian/tests/installed) packaging/install-host-packages units/vmcryptd.shutdown \
	$(wildcard packaging/image/customize config/completion/vmcryptctl.bash config/examples/fetch-from-vault)

# --- installation: the one list of what goes where; packaging/debian and the spec use it ---

DESTDIR ?=
PREFIX ?= /usr
SYSCONFDIR ?= /etc
BINDIR ?= $(PREFIX)/bin
SBINDIR ?= $(PREFIX)/sbin
DATADIR ?= $(PREFIX)/share
# An application, not a library: its modules are its own, wherever this Python keeps others.
PYDIR ?= $(DATADIR)/vmcryptd
DOCDIR ?= $(DATADIR)/doc/vmcryptd
# These are systemd's, udev's, D-Bus's and polkit's, whatever the prefix of ours is.
UNITDIR ?= /usr/lib/systemd/system
SHUTDOWNDIR ?= /usr/lib/systemd/system-shutdown
UDEVDIR ?= /usr/lib/udev/rules.d
# After 55-dm and before 60-persistent-storage-dm, as Debian numbers them. Where lvm2 has its own
# numbers (10-dm, 13-dm-disk: Fedora, Arch), this is to be 12.
UDEV_ORDER ?= 57
DBUSDIR ?= /usr/share/dbus-1
POLKITDIR ?= /usr/share/polkit-1/actions
RST2MAN ?= rst2man
INSTALL ?= install

MAN := $(patsubst docs/%.rst,build/man/%,$(wildcard docs/*.[158].rst))
MODULES := $(shell find vmcryptd -name '*.py' -o -name py.typed | LC_ALL=C sort)

.PHONY: man install

man: $(MAN)

build/man/%: docs/%.rst
	@mkdir -p $(@D)
	$(RST2MAN) --strict --no-generator --no-datestamp $< $@

install: man
	for file in $(MODULES); do $(INSTALL) -Dm 644 "$$file" "$(DESTDIR)$(PYDIR)/$$file"; done
	$(INSTALL) -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(SBINDIR)
	sed 's|@PYDIR@|$(PYDIR)|; s|@MODULE@|cli.main|' packaging/launcher.in >$(DESTDIR)$(BINDIR)/vmcryptctl
	sed 's|@PYDIR@|$(PYDIR)|; s|@MODULE@|daemon|' packaging/launcher.in >$(DESTDIR)$(SBINDIR)/vmcryptd
	chmod 755 $(DESTDIR)$(BINDIR)/vmcryptctl $(DESTDIR)$(SBINDIR)/vmcryptd
	$(INSTALL) -d $(DESTDIR)$(UNITDIR)
	for unit in units/*.service units/*.target; do \
	    sed 's|/usr/bin/vmcryptctl|$(BINDIR)/vmcryptctl|; s|/usr/sbin/vmcryptd|$(SBINDIR)/vmcryptd|' \
	        "$$unit" >"$(DESTDIR)$(UNITDIR)/$${unit##*/}"; \
	    chmod 644 "$(DESTDIR)$(UNITDIR)/$${unit##*/}"; \
	done
	$(INSTALL) -Dm 755 units/vmcryptd.shutdown $(DESTDIR)$(SHUTDOWNDIR)/vmcryptd
	$(INSTALL) -Dm 644 units/vmcryptd.rules $(DESTDIR)$(UDEVDIR)/$(UDEV_ORDER)-vmcryptd.rules
	$(INSTALL) -Dm 644 config/org.vmcryptd1.conf -t $(DESTDIR)$(DBUSDIR)/system.d
	$(INSTALL) -Dm 644 config/org.vmcryptd1.service -t $(DESTDIR)$(DBUSDIR)/system-services
	$(INSTALL) -Dm 644 config/org.vmcryptd1.policy -t $(DESTDIR)$(POLKITDIR)
	$(INSTALL) -Dm 644 config/vmcryptd.toml -t $(DESTDIR)$(SYSCONFDIR)/vmcryptd
	$(INSTALL) -d $(DESTDIR)$(SYSCONFDIR)/vmcryptd/conf.d
	$(INSTALL) -dm 700 $(DESTDIR)$(SYSCONFDIR)/vmcryptd/keys
	$(INSTALL) -Dm 644 config/completion/vmcryptctl.bash \
	    $(DESTDIR)$(DATADIR)/bash-completion/completions/vmcryptctl
	$(INSTALL) -Dm 644 config/completion/_vmcryptctl -t $(DESTDIR)$(DATADIR)/zsh/site-functions
	$(INSTALL) -Dm 644 config/completion/vmcryptctl.fish \
	    -t $(DESTDIR)$(DATADIR)/fish/vendor_completions.d
	for page in $(MAN); do \
	    $(INSTALL) -Dm 644 "$$page" -t "$(DESTDIR)$(DATADIR)/man/man$${page##*.}"; \
	done
	$(INSTALL) -Dm 644 $(wildcard README.md NEWS.md) -t $(DESTDIR)$(DOCDIR)
	$(INSTALL) -Dm 644 $(wildcard docs/guides/*.md) -t $(DESTDIR)$(DOCDIR)/guides
	$(INSTALL) -Dm 644 $(wildcard config/examples/*) -t $(DESTDIR)$(DOCDIR)/examples
