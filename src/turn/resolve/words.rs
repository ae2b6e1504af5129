//! The outcomes and reasons of [`resolve`](super::resolve) in plain words. The request log keeps the names; people get the sentences.

/// What became of the conversation, by the name of an [`Outcome`](super::Outcome).
#[must_use]
pub fn outcome(name: &str) -> Option<&'static str> {
    Some(match name {
        "live_alias_reuse" => "it went on in the session that this replica had open",
        "owner_forward" => "it was sent to the replica that owns the conversation",
        "stale_recovery" => "its session was gone, and a new one took the conversation over",
        "snapshot_recovery" => "the conversation was told again from its snapshots",
        "fresh_start" => "it brought all that it needed, and began a session",
        "fork" => "it got a session of its own beside that of its key",
        "token_invalid" => "refused: its turn state is not one that was given to this client",
        "wrong_instance" => {
            "refused: another replica owns the conversation, and turns cannot be sent there"
        }
        "expired_continuity" => "refused: the conversation is gone, and nothing was kept of it",
        "previous_response_not_found" => "refused: nobody knows the response that it continues",
        "continuity_conflict" => {
            "refused: its turn state and its response belong to different conversations"
        }
        "owner_unreachable" => {
            "refused: the owner of the conversation does not answer, and is not dead yet"
        }
        "metadata_unavailable" => "refused: Postgres did not say where the conversation is",
        "draining" => "refused: the replica was shutting down",
        "overloaded" => "refused: there was no room for it",
        _ => return None,
    })
}

/// What led to it, by the name in a [`Resolution`](super::Resolution) or of what was found later.
#[must_use]
pub fn reason(name: &str) -> Option<&'static str> {
    Some(match name {
        "idle" => "the session was waiting for its next turn",
        "queued" => "the session was in a turn; this one waited for its end",
        "abandoned_turn" => "the turn before it had lost its client, and was hurried",
        "session_busy" => "the session was in another turn",
        "lease_lost" => "this replica had lost the conversation to another one",
        "owner_elsewhere" => "another replica owns the conversation",
        "owner_takes_no_turns" => {
            "the replica that owns the conversation has no internal listener, or is leaving"
        }
        "owner_dead" => "the replica that owned the conversation is dead",
        "owner_free" => "no replica owned the conversation",
        "owner_silent" => "the replica that owns the conversation did not answer",
        "owner_full" => "the replica that owns the conversation has no room",
        "begun_elsewhere" => "another replica had begun this very request, and may still answer it",
        "contended" => "the conversation changed hands again and again",
        "not_owner" => "a peer sent it here, but another replica owns the conversation",
        "soft_key_elsewhere" => {
            "its prompt cache key is in use on another replica, and says nothing of one conversation"
        }
        "to_the_clients_socket" => "the client's WebSocket is here, so the conversation moved here",
        "session_gone" => "the session had ended; the conversation was still this replica's",
        "purged" => "the conversation had not been used for so long that its lease was deleted",
        "old_token" => "its turn state is older than a day",
        "unknown_key" => "its turn state was made under a master key that is gone",
        "invalid_token" => "its turn state is damaged, forged or another client's",
        "no_session" => "nothing in the request names a conversation",
        "no_room" => "every session of this replica was busy",
        "queue_full" => "too many turns were waiting for the session",
        "not_the_head" => "it continues a response that is not the last one of its session",
        "response_wins" => {
            "its turn state names another conversation than its response, and the response is kept"
        }
        "token_and_response_differ" => {
            "its turn state names another conversation than its response, which is not kept"
        }
        "unknown_response" => "the response that it continues was never kept here, or has expired",
        "no_snapshot" => "the response that it continues was not kept whole",
        "postgres_away" => "Postgres did not answer",
        "draining" => "the replica takes no new turns",
        _ => return None,
    })
}
