//! One tiny real turn per transport, straight at upstream, by the code that turns use; what came is compared with [`expect`](super::expect).

use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http::HeaderMap;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    expect::{Assumption, EVERYWHERE, HTTP, Seen, WEBSOCKET},
    judge::{Finding, fail, ok, warn},
};
use crate::{
    account::Accounts,
    bus::Bus,
    cli::accounts::find,
    config::Config,
    db::{Db, Installation},
    ids::AccountId,
    protocol::{failure::Failure, headers},
    quota::Quota,
    secret::KeyRing,
    task::Tasks,
    upstream::{
        Unsent, Upstream,
        credential::{Credential, Freshness},
    },
};

/// For one turn, and what is asked beside it.
const TURN: Duration = Duration::from_secs(120);
/// A parameter that SDKs send and upstream refuses before it does anything.
const REFUSED: &str = "max_output_tokens";
/// How upstream answers a frame that continues what it does not know.
const UNKNOWN: &str = r#""error" 400 "previous_response_not_found""#;
const TELL: &str = "the tests assume otherwise: please report it with the release and the date";

/// An account, ready to be asked.
struct Line<'a> {
    upstream: Upstream,
    account: AccountId,
    credential: std::sync::Arc<Credential>,
    model: &'a str,
}

/// Runs the turns.
pub(super) async fn run(
    name: &str,
    model: &str,
    db: &Db,
    ring: &KeyRing,
    config: &Config,
) -> Vec<Finding> {
    let tasks = Tasks::new();
    let found = match Line::open(name, model, db, ring, config, &tasks).await {
        Ok((line, quota)) => {
            let (http, socket) = (in_time(line.http()).await, in_time(line.websocket()).await);
            quota.flush().await;
            [
                told("live-http", &[EVERYWHERE, HTTP], http),
                told("live-ws", &[EVERYWHERE, WEBSOCKET], socket),
            ]
            .concat()
        }
        Err(error) => vec![fail(
            "live",
            format!("{error:#}"),
            "name an active account: `drawbridge accounts list`",
        )],
    };
    tasks.stop();
    found
}

/// An upstream that takes a request and then is silent is a finding too.
async fn in_time(turn: impl Future<Output = Turn>) -> Turn {
    let late = || anyhow!("upstream did not finish it within {} s", TURN.as_secs());
    timeout(TURN, turn).await.unwrap_or_else(|_| Err(late()))
}

/// A turn and what was refused beside it, or why there is none.
type Turn = anyhow::Result<(Seen, Option<String>, u128)>;

fn told(name: &str, assumptions: &[&[Assumption]], turn: Turn) -> Vec<Finding> {
    let (seen, refusal, ms) = match turn {
        Ok(turn) => turn,
        Err(error) => {
            return vec![fail(
                name,
                format!("no turn: {error:#}"),
                "look at the account: `drawbridge quota ACCOUNT`",
            )];
        }
    };
    let looks = assumptions.iter().copied().flatten();
    let looked = looks.clone().count() + 1;
    let differences = looks.filter_map(|(what, look)| Some(format!("{what}: {}", look(&seen)?)));
    let differences: Vec<String> = differences.chain(refusal).collect();
    let usage = seen.completed().map(|response| &response["usage"]);
    let count = |key: &str| usage.and_then(|usage| usage[key].as_u64()).unwrap_or(0);
    let cost = format!(
        "a turn of {} events in {ms} ms for {} + {} tokens",
        seen.events.len(),
        count("input_tokens"),
        count("output_tokens"),
    );
    let mut found = vec![ok(
        name,
        format!(
            "{cost}; {} of {looked} assumptions hold",
            looked - differences.len()
        ),
    )];
    found.extend(
        differences
            .into_iter()
            .map(|difference| warn(name, difference, TELL)),
    );
    found
}

impl<'a> Line<'a> {
    async fn open(
        name: &str,
        model: &'a str,
        db: &Db,
        ring: &KeyRing,
        config: &Config,
        tasks: &Tasks,
    ) -> anyhow::Result<(Self, Quota)> {
        let installation = Installation::known(db, ring).await?;
        let pepper = installation.context("there are no accounts yet")?.pepper;
        let accounts = Accounts::new(db.clone(), ring.clone(), pepper);
        let account = find(&accounts.list().await?, name)?;
        let bus = Bus::connect(db).await?;
        let quota = Quota::load(db, &bus, tasks).await?;
        let upstream =
            Upstream::start(&config.upstream, db, &accounts, &quota, &bus, tasks).await?;
        let credential = upstream
            .credentials()
            .fresh(account, Freshness::Any)
            .await?;
        Ok((
            Self {
                upstream,
                account,
                credential,
                model,
            },
            quota,
        ))
    }

    fn body(&self) -> Value {
        let said = json!([{ "type": "input_text", "text": "Say ok." }]);
        json!({
            "model": self.model,
            "instructions": "Answer with one word.",
            "input": [{ "type": "message", "role": "user", "content": said }],
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": false,
            "store": false,
            "stream": true,
            "include": [],
        })
    }

    async fn http(&self) -> Turn {
        let headers = headers::to_upstream_http(&HeaderMap::new());
        let create = async |body: &Value| {
            let body = Bytes::from(body.to_string());
            self.upstream
                .create(
                    self.account,
                    &self.credential,
                    headers.clone(),
                    body,
                    Instant::now(),
                )
                .await
        };
        let mut bad = self.body();
        bad[REFUSED] = 16.into();
        let refusal = match create(&bad).await {
            Err(Unsent::Perhaps(failure)) if failure.status == Some(400) => None,
            Err(failure) => Some(format!(
                "{REFUSED} is refused with 400: {}",
                words(&failure.failure())
            )),
            Ok(_) => Some(format!("{REFUSED} is refused with 400: it is taken")),
        };
        let began = Instant::now();
        let mut events = create(&self.body())
            .await
            .map_err(|unsent| error(&unsent.failure()))?;
        let mut seen = Seen {
            headers: events.headers().clone(),
            events: Vec::new(),
        };
        while let Some(event) = events.next().await.map_err(|failure| error(&failure))? {
            if let Ok(event) = serde_json::from_slice(&event.data()) {
                seen.events.push(event);
            }
        }
        Ok((seen, refusal, began.elapsed().as_millis()))
    }

    async fn websocket(&self) -> Turn {
        let headers = headers::to_upstream_websocket(&HeaderMap::new());
        let connected = self
            .upstream
            .connect(self.account, &self.credential, headers, Instant::now())
            .await;
        let mut socket = connected.map_err(|failure| error(&failure))?;
        let mut seen = Seen {
            headers: socket.headers().clone(),
            events: Vec::new(),
        };
        let mut frame = self.body();
        frame["type"] = "response.create".into();
        let began = Instant::now();
        socket
            .send(frame.to_string().into())
            .await
            .map_err(|failure| error(&failure))?;
        loop {
            let Some(text) = socket.next().await.map_err(|failure| error(&failure))? else {
                break;
            };
            let event: Value = serde_json::from_str(&text)?;
            if event["type"] == "error" {
                bail!(
                    "upstream answers {} {}",
                    event["status"],
                    event["error"]["code"]
                );
            }
            let over = [
                "response.completed",
                "response.failed",
                "response.incomplete",
            ]
            .iter()
            .any(|kind| event["type"] == *kind);
            seen.events.push(event);
            if over {
                break;
            }
        }
        let took = began.elapsed().as_millis();
        // A response that no socket ever had: refused before anything is done.
        frame["previous_response_id"] = "resp_drawbridge_doctor".into();
        socket
            .send(frame.to_string().into())
            .await
            .map_err(|failure| error(&failure))?;
        let answer = socket.next().await.map_err(|failure| error(&failure))?;
        let answer: Value = serde_json::from_str(answer.as_deref().unwrap_or("null"))?;
        socket.close().await;
        let code = &answer["error"]["code"];
        let told = format!("{} {} {code}", answer["type"], answer["status"]);
        let differs = || format!("an unknown response is {UNKNOWN}: {told}");
        let refusal = (told != UNKNOWN).then(differs);
        Ok((seen, refusal, took))
    }
}

fn error(failure: &Failure) -> anyhow::Error {
    anyhow!("{}", words(failure))
}

/// A failure by its class, status and code: never upstream's sentence.
fn words(failure: &Failure) -> String {
    let status = failure
        .status
        .map_or(String::new(), |status| format!(" {status}"));
    let code = failure.code.as_deref().unwrap_or_default();
    format!("{}{status} {code}", failure.class.name())
        .trim_end()
        .to_owned()
}
