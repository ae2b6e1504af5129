//! Rebuilds when a migration is added: the `embed_migrations!` macro tracks only the files it has seen.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
