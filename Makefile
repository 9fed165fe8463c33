# Plain cargo underneath; the scripts only see to it that the servers are there.
.DEFAULT_GOAL := help
.PHONY: help demo test check clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: ## Postgres, RabbitMQ and pgoutbox, started here and gone afterwards
	@scripts/install-servers
	@cargo run --release -- demo

test: ## every test, against real servers
	@scripts/install-servers
	@scripts/install-postgres-versions
	@scripts/install-rabbitmq-4
	cargo test --all-targets
	cargo test --doc

check: ## format, lints, documentation, house rules; no servers
	@scripts/install-servers --compiler-only
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
	cargo test --test it tidy

clean: ## remove what was built and unpacked
	cargo clean
	rm -rf target/servers
