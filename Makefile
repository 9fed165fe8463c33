# Plain cargo underneath; the scripts only see to it that the servers are there.
.DEFAULT_GOAL := help
.PHONY: help demo test check bench faults nemesis simulate plants mutants fuzz package package-test package-lint image-test newcomer clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: ## Postgres, RabbitMQ and pgoutbox, started here and gone afterwards
	@scripts/install-servers
	@cargo run --release -- demo

test: ## every test, against real servers
	@scripts/install-servers
	@scripts/install-postgres-versions
	@scripts/install-rabbitmq-4
	cargo test --all-targets
	cargo test --doc

check: ## format, lints, documentation, house rules, whether plants still fit; no servers
	@scripts/install-servers --compiler-only
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
	cargo test --test it -- tidy the_settings_in_the_package
	scripts/plant-bugs --fit

bench: ## against the limits of the two servers: PART=rate,latency for some, BENCH_ROUNDS (5), BENCH_ROWS (100000)
	@scripts/install-servers
	cargo bench --bench servers --bench micro -- $(PART)

faults: ## every fault of the table on real servers: ROUNDS (20) each, WORKERS (2) side by side
	@[ -e "$$(echo /usr/lib/*/faketime/libfaketime.so.1)" ] || scripts/install-servers faketime
	@scripts/install-servers
	PGOUTBOX_ROUNDS=$(or $(ROUNDS),20) PGOUTBOX_WORKERS=$(or $(WORKERS),2) \
		cargo test --test it the_whole_fault_table -- --ignored --nocapture

nemesis: ## faults drawn from a seed, for MINUTES (60)
	@scripts/install-servers
	PGOUTBOX_MINUTES=$(or $(MINUTES),60) cargo test --test it the_nemesis -- --ignored --nocapture

simulate: ## a million seeds on all cores; SEEDS=n for another number
	PGOUTBOX_SEEDS=$(or $(SEEDS),1000000) cargo test --profile simulation --test it simulation -- --nocapture

plants: ## plant known bugs one by one and see each caught
	@scripts/install-servers
	scripts/plant-bugs

mutants: ## change the core line by line and see a fast test notice (cargo install cargo-mutants)
	cargo mutants -f 'src/outbox/**' -f src/pg/pgoutput.rs -o target/mutants/pure -- --lib
	PGOUTBOX_SEEDS=1500 cargo mutants -f 'src/relay/**' -f src/sink/rabbitmq/ledger.rs -o target/mutants/relay -- \
		--lib --test it -- tests:: simulation::

fuzz: ## every decoder under cargo-fuzz, FUZZ_SECONDS (60) each; installs nightly and cargo-fuzz
	@scripts/install-servers --compiler-only
	@scripts/fuzz

package: ## the Debian package, below target/debian; installs cargo-deb there if it is missing
	@scripts/install-servers --compiler-only
	@scripts/package

package-test: package ## install it as root, run its service's command, deliver, purge, and find nothing left
	@scripts/install-servers
	cargo test --test it the_package_installs -- --ignored --nocapture

package-lint: ## unit, Dockerfile, YAML, scripts and package, by tools that it installs
	@scripts/lint-packages --install

image-test: ## build the container image, and deliver through it between servers in containers; needs docker or podman
	@scripts/try-image

newcomer: ## time the README's quick start from a clean clone
	@scripts/newcomer

clean: ## remove what was built and unpacked
	cargo clean
	rm -rf target/servers fuzz/target fuzz/artifacts
