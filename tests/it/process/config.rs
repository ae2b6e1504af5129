//! A bad configuration is told completely, by name, before anything starts.

use std::{ffi::OsStr, net::TcpListener, os::unix::ffi::OsStrExt as _};

use drawbridge::secret::KeyRing;
use secrecy::ExposeSecret as _;

use crate::support::process::Home;

/// `EX_USAGE`.
const BAD_CONFIGURATION: Option<i32> = Some(64);

#[tokio::test]
async fn every_fault_is_told_at_once_and_nothing_is_started() {
    let home = Home::new()
        .await
        .set("DRAWBRIDGE_LISTEN", "nowhere")
        .set("DRAWBRIDGE_UPSTREAM_URL", "chatgpt.com")
        .set("DRAWBRIDGE_DRAIN_GRACE", "soon")
        .set("DRAWBRIDGE_RETENTION_DAYS", "0")
        .set("DRAWBRIDGE_DATABASE_URL", "postgres://u:hunter2@h/db");
    for command in ["serve", "config", "migrate"] {
        let said = home.run(&[command]).await;
        assert_eq!(said.code, BAD_CONFIGURATION);
        for name in [
            "DRAWBRIDGE_LISTEN=nowhere",
            "DRAWBRIDGE_UPSTREAM_URL",
            "DRAWBRIDGE_DRAIN_GRACE",
            "DRAWBRIDGE_RETENTION_DAYS",
            "DRAWBRIDGE_MASTER_KEYS is not set",
        ] {
            assert!(said.err.contains(name), "{}", said.err);
        }
        assert!(!said.err.contains("hunter2"), "{}", said.err);
        assert_eq!(said.out, "");
    }
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn what_settings_name_is_looked_at_before_anything_is_served() {
    let home = Home::new()
        .await
        .set("DRAWBRIDGE_DATABASE_URL", "postgres://u:hunter2@h:port/db")
        .set("DRAWBRIDGE_DATABASE_DIRECT_URL", "mysql://u:hunter2@h/db")
        .set("DRAWBRIDGE_MASTER_KEYS", "k1:hunter2")
        .set("DRAWBRIDGE_CA_FILE", "/nowhere/ca.pem");
    for command in [&["serve"][..], &["config", "--strict"]] {
        let said = home.run(command).await;
        assert_eq!(said.code, BAD_CONFIGURATION, "{}", said.err);
        for name in [
            "DRAWBRIDGE_DATABASE_URL",
            "DRAWBRIDGE_DATABASE_DIRECT_URL",
            "DRAWBRIDGE_MASTER_KEYS",
            "DRAWBRIDGE_CA_FILE",
        ] {
            assert!(said.err.contains(name), "{}", said.err);
        }
        assert!(!said.err.contains("hunter2"), "{}", said.err);
    }
    for (name, value) in [
        ("DRAWBRIDGE_LOG", "drawbridge=loud"),
        ("DRAWBRIDGE_CA_FILE", ""),
        ("DRAWBRIDGE_MASTER_KEYS_FILE", ""),
        ("DRAWBRIDGE_DATA_DIR", ""),
        ("DRAWBRIDGE_OPERATOR_TOKEN", "sixteen visible characters"),
    ] {
        let said = Home::new().await.set(name, value).run(&["config"]).await;
        assert_eq!(said.code, BAD_CONFIGURATION, "{name}: {}", said.err);
        assert!(said.err.contains(name), "{}", said.err);
    }
    // As a file or a Secret holds it.
    let token = "0123456789abcdef\n";
    let home = Home::new().await.set("DRAWBRIDGE_OPERATOR_TOKEN", token);
    home.ok(&["config", "--strict"]).await;
}

#[tokio::test]
async fn what_is_not_text_in_the_environment_disturbs_nothing() {
    let home = Home::new().await;
    let mut command = home.command(&["config"]);
    command.env("OLDPWD", OsStr::from_bytes(b"/home/m\xfcller"));
    let output = command.output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn a_secret_that_cannot_be_printed_is_no_success() {
    let home = Home::new().await;
    let mut command = home.command(&["keys", "create", "--name", "laptop", "--quiet"]);
    let full = std::fs::File::options().write(true).open("/dev/full");
    let printing = command.stdout(full.unwrap()).spawn().unwrap();
    let output = printing.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("could not all be printed"), "{told}");
}

#[tokio::test]
async fn settings_are_printed_as_json_without_their_secrets() {
    let home = Home::new()
        .await
        .set("DRAWBRIDGE_DATABASE_URL", "postgres://u:hunter2@h/db")
        .set("DRAWBRIDGE_REDIS_URL", "redis://:hunter2@h")
        .set("DRAWBRIDGE_MASTER_KEYS", "k1:hunter2")
        .set("DRAWBRIDGE_DRAIN_GRACE", "90s");
    for command in [&["config"][..], &["config", "--json"]] {
        let said = home.run(command).await;
        assert!(!said.out.contains("hunter2"), "{}", said.out);
    }
    let config = home.json(&["config"]).await;
    for (field, value) in [
        ("/database", "external"),
        ("/redis", ".."),
        ("/master_keys", "given"),
        ("/drain/grace", "90s"),
        ("/upstream/transport", "auto"),
        ("/log/format", "text"),
    ] {
        assert_eq!(config.pointer(field).unwrap(), value, "{field}");
    }
}

#[tokio::test]
async fn an_external_database_without_keys_prints_a_command_whose_output_is_taken() {
    let home = Home::new().await.set(
        "DRAWBRIDGE_DATABASE_URL",
        "postgres://drawbridge@127.0.0.1:1/drawbridge",
    );
    let said = home.run(&["serve"]).await;
    assert_eq!(said.code, BAD_CONFIGURATION);
    let (_, rest) = said.err.split_once("make one with: ").unwrap();
    let command = rest.split_once(" (").unwrap().0;
    let made = std::process::Command::new("sh")
        .args(["-c", command])
        .output()
        .unwrap();
    let keys = String::from_utf8(made.stdout).unwrap();
    let home = home.set("DRAWBRIDGE_MASTER_KEYS", &keys);
    let said = home.run(&["serve"]).await;
    assert_eq!(
        said.code,
        Some(1),
        "now only the database is missing: {}",
        said.err
    );
    assert!(!said.err.contains("MASTER_KEYS"), "{}", said.err);
}

#[tokio::test]
async fn a_master_key_of_another_installation_is_refused_by_the_name_of_its_file() {
    let home = Home::new().await;
    home.import("alice").await;
    let file = home.path().join("master.key");
    let ours = std::fs::read(&file).unwrap();
    std::fs::write(&file, KeyRing::generate("k1").expose_secret()).unwrap();
    for command in [&["serve"][..], &["accounts", "list"]] {
        let said = home.run(command).await;
        assert_eq!(said.code, BAD_CONFIGURATION, "{}", said.err);
        assert!(said.err.contains(file.to_str().unwrap()), "{}", said.err);
        assert_eq!(home.postmaster(), None);
    }
    std::fs::write(&file, ours).unwrap();
    assert_eq!(home.json(&["accounts", "list"]).await[0]["label"], "alice");
}

#[tokio::test]
async fn an_unknown_name_is_warned_about_once_with_the_nearest_and_strictly_refused() {
    let home = Home::new()
        .await
        .set("DRAWBRIDGE_LISTN", "127.0.0.1:1")
        .set("DRAWBRIDGE_SERVICE_HOST", "10.0.0.1");
    let warning = "DRAWBRIDGE_LISTN is not a setting; did you mean DRAWBRIDGE_LISTEN?";
    let said = home.run(&["config"]).await;
    assert_eq!(said.code, Some(0));
    assert_eq!(said.err.trim_end(), format!("drawbridge: {warning}"));
    let said = home.run(&["config", "--strict"]).await;
    assert_eq!(said.code, BAD_CONFIGURATION);
    assert!(said.err.contains(warning), "{}", said.err);

    let (code, log) = home.serve().await.stop().await;
    assert_eq!(code, Some(0));
    assert_eq!(log.matches(warning).count(), 1, "{log}");
    assert!(!log.contains("SERVICE_HOST"), "{log}");
}

#[tokio::test]
async fn a_port_that_is_taken_names_its_setting() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for name in ["DRAWBRIDGE_LISTEN", "DRAWBRIDGE_ADMIN_LISTEN"] {
        let home = Home::new().await.set(name, &address);
        let said = home.run(&["serve"]).await;
        assert_eq!(said.code, Some(1));
        let fault = format!("{name}: cannot listen on {address}");
        assert!(said.err.contains(&fault), "{}", said.err);
        assert_eq!(home.postmaster(), None);
    }
}

#[tokio::test]
async fn a_data_directory_that_cannot_be_made_names_the_settings_that_help() {
    let home = Home::new().await.set("DRAWBRIDGE_DATA_DIR", "/dev/null/d");
    let said = home.run(&["serve"]).await;
    assert_ne!(said.code, Some(0));
    for name in ["DRAWBRIDGE_DATA_DIR", "DRAWBRIDGE_DATABASE_URL"] {
        assert!(said.err.contains(name), "{}", said.err);
    }
}

#[tokio::test]
async fn a_command_whose_reader_leaves_ends_as_if_it_had_read_all() {
    let mut command = Home::new().await.command(&["config"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = command.stdout(writer).output().await.unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && said.is_empty(), "{said}");
}
