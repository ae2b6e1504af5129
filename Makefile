# Everything a developer or an operator of one machine needs. Each target installs what it lacks, says so, and may be repeated.

CARGO ?= cargo

.PHONY: run demo test check rules chart deploy bench load soak chaos drills page deny sbom image try-compose

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
test: check rules chart
	@scripts/install-tools postgres pgbouncer redis codex promtool curl procps
	$(CARGO) test --workspace --quiet
	@$(MAKE) --no-print-directory deploy

## deploy: what deploy/ and .github/ say, proved by nginx, Postgres, PgBouncer, Redis and the linters of their formats
deploy:
	@scripts/install-tools postgres pgbouncer redis nginx codex systemd deploy
	$(CARGO) build --quiet --workspace
	@.tools/deploy/bin/python -m pytest --quiet -p no:cacheprovider tests/deploy

## check: formatting, lints and documentation
check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --quiet --document-private-items

## chart: renders the Helm chart in every shape and holds it against what Kubernetes takes
chart:
	@scripts/install-tools helm
	@.tools/helm/bin/python -B -m pytest tests/helm

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

## load: further kinds of load, beside nginx where it can take them; writes loadtest/results
load:
	@scripts/install-tools postgres nginx
	$(CARGO) build --quiet --release --workspace
	@target/release/loadtest load --drawbridge target/release/drawbridge

## soak: half an hour of conversations that come and go, and whether anything grows; writes loadtest/results
soak:
	@scripts/install-tools postgres
	$(CARGO) build --quiet --release --workspace
	@target/release/loadtest soak --drawbridge target/release/drawbridge

## chaos: breaks three replicas and the network around them for ten minutes and checks every history; writes loadtest/results (CHAOS="--minutes 3 --seed 7")
chaos:
	@scripts/install-tools postgres pgbouncer redis
	$(CARGO) build --quiet --release --workspace
	@target/release/loadtest chaos --drawbridge target/release/drawbridge $(CHAOS)

## drills: what an operator does or has to live through, with 240 clients on three replicas: rolling restarts, a new master key, Postgres away, a standby in its place
drills:
	@scripts/install-tools postgres pgbouncer redis
	$(CARGO) build --quiet --release --workspace
	@for course in rolling rotation outage promotion; do \
		target/release/loadtest chaos --drawbridge target/release/drawbridge --course $$course --clients 240 --pace 500 --minutes 2 --seed 5 \
			--out loadtest/results/drill-$$course.json || exit 1; \
	done

## page: a page with plots from what bench, load, soak, chaos and drills have written
page:
	$(CARGO) run --quiet --release --package loadtest -- page

## deny: licences, sources and known flaws of every crate (the first time it builds cargo-deny, which takes minutes)
deny:
	@scripts/install-tools cargo-deny
	.tools/bin/cargo-deny check

## sbom: what is in the program, as CycloneDX, in drawbridge.cdx.json (the first time it builds cargo-cyclonedx)
sbom:
	@scripts/install-tools cargo-cyclonedx
	.tools/bin/cargo-cyclonedx cyclonedx --format json --spec-version 1.5 --target all --override-filename drawbridge.cdx

## image: the container image drawbridge:local
image:
	docker build --file deploy/Dockerfile --tag drawbridge:local .

## try-compose: brings deploy/compose.yaml up under a name of its own, looks whether it serves, and takes it down
try-compose:
	@scripts/try-compose
