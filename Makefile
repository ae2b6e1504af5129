# Everything a developer or an operator of one machine needs. Each target installs what it lacks, says so, and may be repeated.

CARGO ?= cargo

.PHONY: run demo test check rules bench chaos

## run: the service on embedded Postgres; prints what to do next
run:
	@scripts/install-tools postgres
	$(CARGO) run --quiet --release --bin drawbridge -- serve

## demo: a fake upstream, two replicas, three accounts and traffic to look at
demo:
	@scripts/install-tools postgres
	$(CARGO) build --quiet --release --workspace
	@target/release/loadtest demo --drawbridge target/release/drawbridge

## test: formatting, lints, documentation and every test, with real Postgres, PgBouncer, Redis and the Codex CLI
test: check rules
	@scripts/install-tools postgres pgbouncer redis codex
	$(CARGO) test --workspace --quiet

## check: formatting, lints and documentation
check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --quiet --document-private-items

## rules: the Prometheus rules, and that every alert fires when it should
rules:
	@scripts/install-tools promtool
	promtool check rules deploy/prometheus/rules.yaml
	promtool test rules deploy/prometheus/rules.test.yaml

## bench: nginx and Drawbridge side by side; writes loadtest/results
bench:
	@scripts/install-tools postgres nginx
	$(CARGO) build --quiet --release --workspace
	@target/release/loadtest bench --drawbridge target/release/drawbridge
	@DRAWBRIDGE_SNAPSHOTS=full target/release/loadtest bench --drawbridge target/release/drawbridge --out loadtest/results/bench-full.json

## chaos: breaks three replicas and the network around them for ten minutes and checks every history; writes loadtest/results (CHAOS="--minutes 3 --seed 7")
chaos:
	@scripts/install-tools postgres pgbouncer redis
	$(CARGO) build --quiet --release --workspace
	@target/release/loadtest chaos --drawbridge target/release/drawbridge $(CHAOS)
