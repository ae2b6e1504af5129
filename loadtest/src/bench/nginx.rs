//! The yardstick: nginx that hands bytes on without buffering, with the credentials of one account of the fake.

use std::{fs, path::Path, process::Command};

use anyhow::Context as _;

use super::Target;
use crate::{
    process::{Daemon, children, free_port},
    rig::{Fake, answers, client},
};

/// One is the cheapest way to run it on few cores.
pub(crate) const WORKERS: usize = 1;

/// nginx with a configuration of its own.
pub(crate) struct Nginx {
    daemon: Daemon,
    address: String,
}

impl Nginx {
    pub(crate) async fn start(dir: &Path, fake: &Fake) -> anyhow::Result<Self> {
        let address = format!("127.0.0.1:{}", free_port()?);
        let auth = fake.account("alice").await?;
        let token = |name: &str| {
            auth["tokens"][name]
                .as_str()
                .context("the fake's auth.json")
        };
        let configuration = configuration(
            dir,
            &address,
            fake.origin(),
            token("access_token")?,
            token("account_id")?,
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut command = Command::new("nginx");
        command
            .arg("-p")
            .arg(dir)
            .arg("-e")
            .arg(dir.join("nginx-error.log"))
            .arg("-c")
            .arg(file);
        let mut daemon = Daemon::start(command, dir.join("nginx.log"))?;
        answers(
            &client()?,
            &format!("http://{address}/__fake/ready"),
            &mut daemon,
        )
        .await
        .context("nginx")?;
        Ok(Self { daemon, address })
    }

    pub(crate) fn target(&self) -> anyhow::Result<Target> {
        let mut pids = children(self.daemon.pid())?;
        anyhow::ensure!(pids.len() == WORKERS, "nginx has {} workers", pids.len());
        pids.push(self.daemon.pid());
        Ok(Target {
            name: "nginx",
            url: format!("http://{}/backend-api/codex", self.address),
            key: "none".into(),
            pids,
        })
    }
}

fn configuration(dir: &Path, address: &str, origin: &str, token: &str, account_id: &str) -> String {
    let dir = dir.display();
    let upstream = origin.trim_start_matches("http://");
    format!(
        r#"daemon off;
worker_processes {WORKERS};
pid {dir}/nginx.pid;
error_log {dir}/nginx-error.log warn;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    map $http_upgrade $hop {{ default upgrade; '' ''; }}
    client_body_temp_path {dir}/nginx-body;
    proxy_temp_path {dir}/nginx-proxy;
    fastcgi_temp_path {dir}/nginx-fastcgi;
    uwsgi_temp_path {dir}/nginx-uwsgi;
    scgi_temp_path {dir}/nginx-scgi;
    client_max_body_size 0;
    client_body_buffer_size 256k;
    keepalive_requests 1000000;
    upstream fake {{
        server {upstream};
        keepalive 512;
        keepalive_requests 1000000;
    }}
    server {{
        listen {address};
        location / {{
            proxy_pass http://fake;
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_read_timeout 300s;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $hop;
            proxy_set_header Host {upstream};
            proxy_set_header Authorization "Bearer {token}";
            proxy_set_header chatgpt-account-id "{account_id}";
        }}
    }}
}}
"#
    )
}
