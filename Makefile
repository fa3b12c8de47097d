# Targets with a comment of two number signs are listed by make help.

# What hack/setup unpacks and builds lies here; VMCKPT_CACHE puts it elsewhere.
CACHE := $(abspath $(or $(VMCKPT_CACHE),.cache))
export VMCKPT_CACHE := $(CACHE)

# Where the system has no Go that can build this, hack/setup puts one there.
export PATH := $(CACHE)/bin:$(PATH)

# Single tests start a QEMU by these, where they do not go through test/machine.
export VMCKPT_QEMU10 ?= $(wildcard $(CACHE)/qemu-10/qemu-system-x86_64)

# All packages. PACKAGES=./image/... RUN=TestName narrow a run down.
PACKAGES ?= ./...
RUN ?=
# Tests of real machines wait for guests much of the time, and measure little: two packages at once.
TESTFLAGS ?= -timeout 24m -p 2
SOAK_INSTANTS ?= 1000
SOAK_REPEAT ?= 20
SOAK_CHECKPOINTS ?= 1000
FUZZTIME ?= 30s
# CHAOSFLAGS="-repeat 10 -minutes 60 -run TestKeeper"
CHAOSFLAGS ?=
# BENCHFLAGS="-runs 5 -only increment,qemu -dir DIRECTORY -json FILE"; a whole run takes 4 minutes.
BENCHFLAGS ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## What can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install, unpack and build all that tests need (needs root; quiet when all is there)
	@hack/setup test

.PHONY: build
build: ## bin/vmckpt and the operator's programs
	@hack/setup build
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...

.PHONY: generate
generate: ## What is made from the API's types: deep copies, CRDs
	go tool controller-gen object crd paths=./api/... output:crd:dir=config/crd/bases

.PHONY: check
check: ## Formatting, vet, staticcheck, and vet for arm64
	@hack/setup build
	@unformatted=$$(gofmt -l $$(go list -f '{{.Dir}}' ./...)); \
	if [ -n "$$unformatted" ]; then echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	@rm -rf $(CACHE)/generated && mkdir -p $(CACHE)/generated
	@go tool controller-gen object crd paths=./api/... output:crd:dir=$(CACHE)/generated output:object:dir=$(CACHE)/generated
	@diff -r config/crd/bases $(CACHE)/generated --exclude zz_generated.deepcopy.go && \
	diff api/v1alpha1/zz_generated.deepcopy.go $(CACHE)/generated/zz_generated.deepcopy.go || \
	{ echo "not up to date: make generate"; exit 1; }
	go vet ./...
	GOARCH=arm64 go vet ./...
	go tool staticcheck ./...

.PHONY: test
test: setup ## All tests, on real machines too (under 25 minutes)
	go run ./hack/gotest $(TESTFLAGS) $(if $(RUN),-run '$(RUN)') $(PACKAGES)

.PHONY: soak
soak: setup ## Thousands of random instants against the truth, faults many times over, a thousand checkpoints at once
	go run ./hack/gotest -timeout 0 ./test/truth -instants $(SOAK_INSTANTS) -alone
	go run ./hack/gotest -timeout 0 ./test/faults -repeat $(SOAK_REPEAT)
	go run ./hack/gotest -timeout 0 -v -run TestRealLoad ./node-agent/agent -real-load $(SOAK_CHECKPOINTS)

.PHONY: chaos
chaos: setup ## Faults of a capture at each of its steps, and how many were survived
	go run ./hack/chaos $(CHAOSFLAGS)

.PHONY: bench
bench: setup ## What it costs, beside QEMU's own ways
	go run ./test/bench $(BENCHFLAGS)

.PHONY: demo
demo: ## A real Debian guest captured while it works, killed, restored, going on: by kubectl
	@hack/setup demo
	@CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...
	@go run ./hack/demo

.PHONY: demo-engine
demo-engine: ## The same story by the command line, without Kubernetes
	@hack/setup demo
	@CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...
	@go run ./hack/demo -by vmckpt

.PHONY: fuzz
fuzz: ## Each fuzz target for FUZZTIME (30s)
	@hack/setup build
	@hack/fuzz $(FUZZTIME)

.PHONY: clean
clean: ## Remove what was built; what hack/setup put into .cache stays
	rm -rf bin $(CACHE)/guest
