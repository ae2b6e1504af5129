//! What settings become, and what is told of those that are wrong.

use clap::CommandFactory as _;

use super::*;

#[derive(clap::Parser)]
struct Probe {
    #[command(flatten)]
    settings: Settings,
}

#[test]
fn the_list_of_names_is_complete() {
    let command = Probe::command();
    let mut names: Vec<_> = command
        .get_arguments()
        .filter_map(|arg| arg.get_env())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    // Not a setting of the service: the variable that README's client configuration reads the key from.
    names.push("DRAWBRIDGE_KEY".into());
    assert_eq!(names, NAMES);
}

#[test]
fn nothing_set_is_a_working_configuration() {
    let config = Settings::default().check().unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:2455");
    assert!(matches!(config.database, Database::Embedded));
    assert!(matches!(config.master_keys, MasterKeys::Generated(_)));
}

#[test]
fn all_faults_are_reported_at_once_and_no_secret_is_quoted() {
    let faults = Settings {
        listen: Some("nowhere".into()),
        drain_grace: Some("soon".into()),
        database_url: Some("postgres://u:hunter2@h/db".into()),
        log_format: Some("xml".into()),
        ..Settings::default()
    }
    .check()
    .unwrap_err();
    assert_eq!(faults.len(), 4, "{faults:?}");
    assert!(
        faults
            .iter()
            .any(|fault| fault.contains("openssl rand -base64 32"))
    );
    assert!(!faults.concat().contains("hunter2"));
}

#[test]
fn peers_are_told_an_address_that_they_can_use() {
    let check = |listen: Option<&str>, url: Option<&str>| {
        Settings {
            internal_listen: listen.map(Into::into),
            internal_url: url.map(Into::into),
            ..Settings::default()
        }
        .check()
        .map(|config| {
            config
                .internal
                .map(|internal| internal.endpoint(internal.listen))
        })
    };
    for (listen, url, expected) in [
        (None, None, None),
        (Some("10.0.0.7:2456"), None, Some("http://10.0.0.7:2456")),
        (Some("[::1]:2456"), None, Some("http://[::1]:2456")),
        (
            Some("0.0.0.0:2456"),
            Some("https://bridge-0:2456/"),
            Some("https://bridge-0:2456"),
        ),
    ] {
        assert_eq!(check(listen, url), Ok(expected.map(Into::into)));
    }
    for (listen, url) in [
        (Some("0.0.0.0:2456"), None),
        (Some("[::]:2456"), None),
        (None, Some("http://bridge-0:2456")),
    ] {
        let faults = check(listen, url).unwrap_err();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].contains("DRAWBRIDGE_INTERNAL_LISTEN"));
        assert!(faults[0].contains("DRAWBRIDGE_INTERNAL_URL"));
    }
}

#[test]
fn the_url_of_redis_is_checked_and_never_shown() {
    let check = |url: &str| {
        Settings {
            redis_url: Some(url.into()),
            ..Settings::default()
        }
        .check()
    };
    for good in ["redis://:hunter2@h", "rediss://u:hunter2@h:6380/2"] {
        let shown = format!("{:?}", check(good).unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
    }
    for bad in ["hunter2", "http://hunter2", "redis://h:hunter2"] {
        let faults = check(bad).unwrap_err().concat();
        assert!(faults.contains("DRAWBRIDGE_REDIS_URL"));
        assert!(!faults.contains("hunter2"));
    }
}
