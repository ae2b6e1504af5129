//! Where a database is and how its connection is protected: the parameters that operators know from libpq.
//!
//! `sslmode` = `disable`, `prefer` (default), `require`, `verify-ca`, `verify-full`; `sslrootcert` = a PEM file or `system`; `sslcert` and
//! `sslkey` = a client certificate. As with libpq, `prefer` and `require` do not verify the server unless `sslrootcert` is given.

use std::{fmt, future::Future, path::Path, sync::Arc};

use futures_util::{StreamExt as _, stream, stream::BoxStream};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
};
use tokio_postgres::{AsyncMessage, Client, Config, config::SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{Error, tuned};

/// How to reach a database. Printing it shows hosts and the database name, never user or password.
#[derive(Clone)]
pub struct Endpoint {
    config: Config,
    tls: MakeRustlsConnect,
}

/// Why a database URL cannot be used; never quotes it.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Not a URL or key-value string that libpq would take.
    #[error("is not a Postgres URL: {0}")]
    Url(#[from] tokio_postgres::Error),
    /// `sslmode` is none of the five.
    #[error("has an unknown sslmode; use disable, prefer, require, verify-ca or verify-full")]
    Mode,
    /// A certificate or key cannot be read.
    #[error("names a {0} that cannot be used: {1}")]
    File(&'static str, String),
}

/// What is verified of the server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verify {
    Nothing,
    Chain,
    ChainAndName,
}

impl Endpoint {
    /// Reads a database URL (`postgres://user:password@host:port/db?sslmode=..`).
    ///
    /// # Errors
    /// If it cannot be read, or names files that cannot be used.
    pub fn parse(url: &str) -> Result<Self, EndpointError> {
        let (rest, ssl) = take_ssl_parameters(url);
        let mut config: Config = rest.parse()?;
        let (mode, verify) = match (ssl.get("sslmode"), ssl.get("sslrootcert")) {
            (Some("disable"), _) => (SslMode::Disable, Verify::Nothing),
            (None | Some("prefer"), None) => (SslMode::Prefer, Verify::Nothing),
            (None | Some("prefer"), Some(_)) => (SslMode::Prefer, Verify::Chain),
            (Some("require"), None) => (SslMode::Require, Verify::Nothing),
            (Some("require"), Some("system")) | (Some("verify-full"), _) => {
                (SslMode::Require, Verify::ChainAndName)
            }
            (Some("require"), Some(_)) | (Some("verify-ca"), _) => {
                (SslMode::Require, Verify::Chain)
            }
            _ => return Err(EndpointError::Mode),
        };
        config.ssl_mode(mode);
        let tls = MakeRustlsConnect::new(client_config(&ssl, verify)?);
        Ok(Self {
            config: tuned(config),
            tls,
        })
    }

    /// An endpoint on this machine's unix socket.
    ///
    /// # Panics
    /// Never: no file is read.
    #[must_use]
    pub fn local(mut config: Config) -> Self {
        config.ssl_mode(SslMode::Disable);
        let tls =
            client_config(&SslParameters::default(), Verify::Nothing).expect("no file is read");
        Self {
            config: tuned(config),
            tls: MakeRustlsConnect::new(tls),
        }
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn tls(&self) -> &MakeRustlsConnect {
        &self.tls
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}/{}",
            self.config.get_hosts(),
            self.config.get_dbname().unwrap_or("-")
        )
    }
}

/// The half of a connection that moves bytes. The connection lives as long as it is polled.
pub struct Driver(BoxStream<'static, Result<AsyncMessage, tokio_postgres::Error>>);

impl Driver {
    /// The next notice or notification; `None` when the connection ended.
    pub async fn next(&mut self) -> Option<AsyncMessage> {
        match self.0.next().await? {
            Ok(message) => Some(message),
            Err(error) => {
                tracing::debug!(error = %Error::postgres("connection", error), "a connection ended");
                None
            }
        }
    }

    /// Moves bytes until the connection ends.
    pub(super) async fn run(mut self) {
        while self.next().await.is_some() {}
    }

    /// Moves bytes while `work` runs.
    pub(super) async fn during<T>(
        self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            result = work => result,
            () = self.run() => Err(Error::unavailable("connection", "it was lost".into())),
        }
    }
}

/// Opens one connection outside the pools.
pub(super) async fn connect(endpoint: &Endpoint) -> Result<(Client, Driver), Error> {
    let (client, mut connection) = endpoint
        .config
        .connect(endpoint.tls.clone())
        .await
        .map_err(|error| Error::postgres("connecting", error))?;
    let messages = stream::poll_fn(move |context| connection.poll_message(context));
    Ok((client, Driver(messages.boxed())))
}

/// The `ssl*` parameters that the driver does not know itself.
#[derive(Default)]
struct SslParameters(Vec<(String, String)>);

impl SslParameters {
    fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Splits the `ssl*` parameters off a URL or a key-value string.
fn take_ssl_parameters(url: &str) -> (String, SslParameters) {
    let (head, query, separator) = match url.split_once('?') {
        Some((head, query)) if url.contains("://") => (format!("{head}?"), query, '&'),
        _ if url.contains("://") => (url.to_owned(), "", '&'),
        _ => (String::new(), url, ' '),
    };
    let (ssl, rest): (Vec<&str>, Vec<&str>) = query
        .split(separator)
        .partition(|parameter| parameter.starts_with("ssl"));
    let parameters = ssl.iter().filter_map(|parameter| parameter.split_once('='));
    let parameters = parameters
        .map(|(key, value)| (key.to_owned(), value.trim_matches('\'').to_owned()))
        .collect();
    (
        head + &rest.join(&separator.to_string()),
        SslParameters(parameters),
    )
}

fn client_config(ssl: &SslParameters, verify: Verify) -> Result<ClientConfig, EndpointError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = match ssl.get("sslrootcert") {
        Some(path) if path != "system" => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates("sslrootcert", path)? {
                roots
                    .add(certificate)
                    .map_err(|error| EndpointError::File("sslrootcert", error.to_string()))?;
            }
            roots
        }
        _ => RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
    };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("ring supports the default versions");
    let builder = match verify {
        Verify::ChainAndName => builder.with_root_certificates(roots),
        Verify::Chain => {
            let chain =
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                    .build();
            let chain =
                chain.map_err(|error| EndpointError::File("sslrootcert", error.to_string()))?;
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Lenient {
                    chain: Some(chain),
                    provider,
                }))
        }
        Verify::Nothing => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Lenient {
                chain: None,
                provider,
            })),
    };
    let (Some(cert), Some(key)) = (ssl.get("sslcert"), ssl.get("sslkey")) else {
        return Ok(builder.with_no_client_auth());
    };
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| EndpointError::File("sslkey", error.to_string()))?;
    builder
        .with_client_auth_cert(certificates("sslcert", cert)?, key)
        .map_err(|error| EndpointError::File("sslcert", error.to_string()))
}

fn certificates(
    parameter: &'static str,
    path: &str,
) -> Result<Vec<CertificateDer<'static>>, EndpointError> {
    CertificateDer::pem_file_iter(Path::new(path))
        .and_then(Iterator::collect)
        .map_err(|error| EndpointError::File(parameter, error.to_string()))
}

/// libpq's weaker modes: the chain without the name (`verify-ca`), or nothing (`prefer`, `require`). Signatures of the handshake are
/// always verified.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else {
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssl_parameters_are_taken_from_both_forms() {
        let (rest, ssl) = take_ssl_parameters(
            "postgres://u:p@h/db?sslmode=verify-full&connect_timeout=3&sslrootcert=/a.pem",
        );
        assert_eq!(rest, "postgres://u:p@h/db?connect_timeout=3");
        assert_eq!(
            (ssl.get("sslmode"), ssl.get("sslrootcert")),
            (Some("verify-full"), Some("/a.pem"))
        );
        let (rest, ssl) = take_ssl_parameters("host=h user=u sslmode=require");
        assert_eq!(
            (rest.as_str(), ssl.get("sslmode")),
            ("host=h user=u", Some("require"))
        );
    }

    #[test]
    fn an_endpoint_never_prints_its_password() {
        let endpoint =
            Endpoint::parse("postgres://user:hunter2@example.test/db?sslmode=require").unwrap();
        assert_eq!(format!("{endpoint:?}"), "[Tcp(\"example.test\")]/db");
        let error = Endpoint::parse("postgres://user:hunter2@h/db?sslmode=maybe")
            .err()
            .unwrap();
        assert!(!error.to_string().contains("hunter2"));
    }

    #[test]
    fn a_missing_certificate_is_named_by_its_parameter() {
        let error = Endpoint::parse("postgres://h/db?sslmode=verify-ca&sslrootcert=/nowhere.pem")
            .err()
            .unwrap();
        assert!(
            error
                .to_string()
                .starts_with("names a sslrootcert that cannot be used"),
            "{error}"
        );
    }
}
