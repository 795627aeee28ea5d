//! The two listeners and the way of a request: log, access, faults, answer.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use super::{
    Shared, Site,
    body::{Connection, Ending, FaultyBody},
    content::{Answer, Asked, asked_range},
    fault::Effect,
};

/// Serves one address until the task is dropped.
pub(super) async fn serve(listener: TcpListener, site: Site, shared: Arc<Shared>) {
    loop {
        let Ok((socket, _)) = listener.accept().await else { continue };
        tokio::spawn(serve_connection(socket, site, shared.clone()));
    }
}

async fn serve_connection(socket: TcpStream, site: Site, shared: Arc<Shared>) {
    let _ = socket.set_nodelay(true);
    let connection = Connection::new(&socket);
    let service = service_fn(|request| {
        let (shared, connection) = (shared.clone(), connection.clone());
        async move { respond(request, site, &shared, connection).await }
    });
    let http = hyper::server::conn::http1::Builder::new();
    // An error is a client that went away or a fault of ours; tests look at the log instead.
    let _ = http.serve_connection(TokioIo::new(socket), service).await;
}

/// The connection is to be closed without an answer.
#[derive(Debug)]
struct Aborted;

impl std::fmt::Display for Aborted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("fault: no answer")
    }
}

impl std::error::Error for Aborted {}

async fn respond(
    request: Request<Incoming>,
    site: Site,
    shared: &Shared,
    connection: Connection,
) -> Result<Response<FaultyBody>, Aborted> {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let query = parse_query(head.uri.query().unwrap_or_default());
    let number = shared.log(site, &head);
    let _running = shared.running();
    let is_range = head.headers.contains_key(header::RANGE);
    let effect = shared.meet(head.method.as_str(), &path, is_range);

    if let Some(Effect::Delay(time)) = &effect {
        tokio::time::sleep(*time).await;
    }
    if let Some(Effect::ResetAtOnce) = &effect {
        connection.reset_at_close();
        return Err(Aborted);
    }
    let limit = if let Some(Effect::AbortUpload(bytes)) = &effect { Some(*bytes) } else { None };
    let received = read_body(body, limit).await;
    shared.received(number, received.len());
    if limit.is_some() {
        shared.content().keep_upload_part(&path, &received);
        connection.reset_at_close();
        return Err(Aborted);
    }

    let asked = Asked { method: &head.method, path: &path, query: &query, headers: &head.headers, body: &received };
    let answer = match &effect {
        Some(effect) => early_answer(effect, &asked, shared),
        None => None,
    };
    let answer = match answer {
        Some(answer) => answer,
        None => usual_answer(&asked, site, shared),
    };
    if let Some(Effect::LoseAnswer) = &effect {
        connection.reset_at_close();
        return Err(Aborted);
    }
    shared.answered(number, answer.status);
    Ok(with_fault(answer, effect.as_ref(), &asked, connection))
}

async fn read_body(mut body: Incoming, limit: Option<u64>) -> Bytes {
    let mut received = BytesMut::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data() {
            received.extend_from_slice(&data);
        }
        let limit = limit.and_then(|limit| usize::try_from(limit).ok());
        if let Some(limit) = limit.filter(|limit| received.len() >= *limit) {
            received.truncate(limit);
            break;
        }
    }
    received.freeze()
}

/// What the registry answers when nothing goes wrong.
fn usual_answer(asked: &Asked<'_>, site: Site, shared: &Shared) -> Answer {
    if asked.path == "/token" {
        return shared.guard().token_request(asked);
    }
    if site == Site::Elsewhere {
        return shared.signed_blob(asked);
    }
    if let Some(refusal) = shared.guard().refuse(asked, shared.addresses()) {
        return refusal;
    }
    if let Some(location) = shared.redirection(asked) {
        return Answer::new(StatusCode::TEMPORARY_REDIRECT, "").header(header::LOCATION, location);
    }
    shared.content().answer(asked)
}

/// The answers of faults that keep a request from the registry.
fn early_answer(effect: &Effect, asked: &Asked<'_>, shared: &Shared) -> Option<Answer> {
    let status = |status: &u16| StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    match effect {
        Effect::Status(code) => Some(Answer::error(status(code), "UNKNOWN", "fault: this status was asked for")),
        Effect::RetryAfter(code, time) => {
            Some(Answer::error(status(code), "TOOMANYREQUESTS", "fault: later").header(header::RETRY_AFTER, time))
        }
        Effect::Unauthorized => Some(shared.guard().challenge(asked, shared.addresses())),
        Effect::RedirectTo(location) => {
            Some(Answer::new(StatusCode::TEMPORARY_REDIRECT, "").header(header::LOCATION, location))
        }
        _ => None,
    }
}

/// Turns an answer into one with the fault.
fn with_fault(
    mut answer: Answer,
    effect: Option<&Effect>,
    asked: &Asked<'_>,
    connection: Connection,
) -> Response<FaultyBody> {
    let mut ending = Ending::Whole;
    let mut stall = None;
    let mut drips = false;
    let mut length_known = true;
    match effect {
        Some(Effect::ShiftRange(by)) => shift(&mut answer, asked.headers, *by, true),
        Some(Effect::ShiftBytes(by)) => shift(&mut answer, asked.headers, *by, false),
        Some(Effect::IgnoreRange) => {
            if let Some(whole) = answer.whole.take() {
                answer.status = StatusCode::OK;
                answer.headers.remove(header::CONTENT_RANGE);
                answer.body = whole;
            }
        }
        Some(Effect::Truncate(at)) => ending = Ending::Close(*at),
        Some(Effect::Reset(at)) => ending = Ending::Reset(*at),
        Some(Effect::EndEarly(at)) => {
            let at = usize::try_from(*at).unwrap_or(usize::MAX).min(answer.body.len());
            answer.body.truncate(at);
            length_known = false;
        }
        Some(Effect::ExtraBytes(more)) => {
            answer.body = [&answer.body[..], more].concat().into();
            length_known = false;
        }
        Some(Effect::Stall(at, time)) => stall = Some((*at, *time)),
        Some(Effect::Drip(at, time)) => (stall, drips) = (Some((*at, *time)), true),
        Some(Effect::NoLength) => length_known = false,
        Some(Effect::WrongContent(content)) => {
            let whole = Answer::blob(content, asked.headers);
            if answer.whole.is_some() {
                answer.status = whole.status;
                answer.headers.extend(whole.headers);
            }
            answer.body = whole.body;
        }
        Some(Effect::FlipBit(at)) => {
            let mut bytes = answer.body.to_vec();
            if let Some(byte) = usize::try_from(*at).ok().and_then(|at| bytes.get_mut(at)) {
                *byte ^= 1;
            }
            answer.body = bytes.into();
        }
        Some(Effect::DigestHeader(digest)) => answer = answer.header("docker-content-digest", digest),
        Some(Effect::Header(name, value)) => answer = answer.header(*name, value),
        _ => {}
    }
    let mut headers = answer.headers;
    if length_known {
        headers.insert(header::CONTENT_LENGTH, answer.body.len().into());
    }
    let is_head = asked.method == http::Method::HEAD;
    let body = if is_head { Bytes::new() } else { answer.body };
    let body = FaultyBody::new(body, connection)
        .ending(ending)
        .stall(stall)
        .drips(drips)
        .length_known(length_known && !is_head);
    let mut response = Response::new(body);
    *response.status_mut() = answer.status;
    *response.headers_mut() = headers;
    response
}

/// Answers a range request with other bytes, and says so or does not.
fn shift(answer: &mut Answer, headers: &HeaderMap, by: u64, honest: bool) {
    let Some(whole) = answer.whole.clone() else { return };
    let Some(Ok((start, end))) = asked_range(headers, whole.len()) else { return };
    let by = usize::try_from(by).unwrap_or(usize::MAX);
    let shifted: Bytes = whole.iter().cycle().skip(start.saturating_add(by)).take(end - start).copied().collect();
    answer.body = shifted;
    if honest && let Ok(value) = format!("bytes {}-{}/{}", start + by, end + by - 1, whole.len()).parse() {
        answer.headers.insert(header::CONTENT_RANGE, value);
    }
}

/// Splits and decodes a query or a form.
pub(super) fn parse_query(text: &str) -> Vec<(String, String)> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(k, v)| (decode(k), decode(v))).collect()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match (first, hex.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = tail;
            }
            (byte, _) => {
                bytes.push(*byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let pairs = parse_query("scope=repository%3Aa%2Fb%3Apull&n=1+2&flag&bad=%zz");
        let expected = [("scope", "repository:a/b:pull"), ("n", "1 2"), ("flag", ""), ("bad", "%zz")];
        assert_eq!(pairs, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
}
