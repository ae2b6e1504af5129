//! A Redis of its own for a test: nothing on disk, on 127.0.0.1.

use std::{
    net::Ipv4Addr,
    process::{Child, Command},
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

use super::pg;

const SCRIPT: &str = r#"redis-server "$@" & read -r _; kill -KILL $!; wait"#;

/// The server lives until this is dropped, or until this process ends in any way.
pub(crate) struct RedisServer {
    shell: Child,
}

impl RedisServer {
    /// On a port; returns when it accepts connections.
    pub(crate) async fn start(port: u16) -> Self {
        Self::with(port, &[]).await
    }

    /// The same with further arguments.
    pub(crate) async fn with(port: u16, arguments: &[&str]) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", SCRIPT, "redis", "--bind", "127.0.0.1", "--save", ""]);
        shell.args(["--appendonly", "no", "--port", &port.to_string()]);
        shell.args(arguments);
        let server = Self {
            shell: pg::outliving(shell.current_dir("/")),
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .is_err()
        {
            assert!(
                Instant::now() < deadline,
                "no Redis after 10 s: is it installed?"
            );
            sleep(Duration::from_millis(10)).await;
        }
        server
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        self.shell.wait().unwrap();
    }
}
