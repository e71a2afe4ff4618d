# gondola: `make run` boots a guest, `make test` runs every test.
# Both install what they need on a Debian machine as root; elsewhere they say
# what is missing.

SHELL    := /bin/bash
BIN      := bin
GO       ?= $(shell .ci/deps --go)
CMD      ?= uname -a
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X main.version=$(VERSION)
# Where there is no /dev/kvm, an emulated host has one.
KVMHOST  := $(shell [ -r /dev/kvm ] && [ -w /dev/kvm ] || echo .ci/kvmhost --)
export CGO_ENABLED = 0

.DEFAULT_GOAL := help
.PHONY: help run shell test unit bench fuzz lint build kernel deps clean

help: ## show this
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install what builds and tests need (Debian packages)
	@.ci/deps

build: deps ## build bin/gondola with the guest agent inside
	@mkdir -p $(BIN)
	@$(GO) build -trimpath -ldflags '-s -w' -o cmd/gondola/agentbin/gondola-agent ./cmd/gondola-agent
	@$(GO) build -trimpath -ldflags '-s -w' -o $(BIN)/gondola-env ./cmd/gondola-env
	@$(GO) build -trimpath -tags embed_agent -ldflags '$(LDFLAGS)' -o $(BIN)/gondola-full ./cmd/gondola
	@$(GO) build -trimpath -tags embed_agent,lean -ldflags '$(LDFLAGS)' -o $(BIN)/gondola ./cmd/gondola
	@echo "built $(BIN)/gondola"

kernel: build ## build the guest kernel, or find it in the cache
	@$(BIN)/gondola kernel build

run: build ## boot a guest and run CMD in it
	@$(BIN)/gondola kernel build
	@$(if $(KVMHOST),echo "this machine has no usable /dev/kvm: an emulated host has one ($(KVMHOST), some 10 s)" && $(BIN)/gondola userland build uroot)
	@$(KVMHOST) bash -c '"$$0" doctor && echo "gondola run -- $$*" && "$$0" run -- "$$@"' $(BIN)/gondola $(CMD)

shell: build ## boot a guest with an interactive shell
	@$(BIN)/gondola run

test: build ## all tests, unit and guest
	@.ci/test

bench: build ## benchmarks and peers side by side, as a table
	@.ci/bench

fuzz: deps ## every fuzz target for a short time (FUZZTIME=10s)
	@.ci/fuzz

lint: deps ## gofmt, go vet, staticcheck
	@.ci/lint

clean: ## remove what was built here (caches stay: gondola kernel path)
	rm -rf $(BIN)
