//! Lists: repositories, tags, referrers.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use loris_format::digest::Digest;
use serde_json::json;

use super::{
    Registry,
    http::{Answer, Query, json, set},
    name::Repository,
    problem::Problem,
};

/// Tells a client which filters of a list of referrers were applied.
const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");
/// The media type of a list of referrers.
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// `GET /v2/_catalog`
pub async fn repositories(registry: &Registry, query: &Query) -> Answer {
    let names = registry.blocking(|registry| registry.storage().repositories()).await?;
    let (page, next) = page(names, query)?;
    let mut response = json(StatusCode::OK, json!({ "repositories": page }).to_string());
    if let Some(next) = next {
        set(&mut response, header::LINK, &format!("</v2/_catalog?{next}>; rel=\"next\""));
    }
    Ok(response)
}

/// `GET /v2/<name>/tags/list`
pub async fn tags(registry: &Registry, repository: Repository, query: &Query) -> Answer {
    let name = repository.clone();
    let tags = registry.blocking(move |registry| registry.storage().tags(&name)).await?;
    let tags = tags.ok_or_else(|| Problem::name_unknown(format!("no repository is called {repository}")))?;
    let (page, next) = page(tags, query)?;
    let mut response = json(StatusCode::OK, json!({ "name": repository.as_str(), "tags": page }).to_string());
    if let Some(next) = next {
        set(&mut response, header::LINK, &format!("</v2/{repository}/tags/list?{next}>; rel=\"next\""));
    }
    Ok(response)
}

/// `GET /v2/<name>/referrers/<digest>`: a list that may be empty, whether or not the repository or the subject exist.
pub async fn referrers(registry: &Registry, repository: Repository, subject: Digest, query: &Query) -> Answer {
    let mut entries = registry.blocking(move |registry| registry.storage().referrers_of(&repository, &subject)).await?;
    let filter = query.get("artifactType");
    if let Some(wanted) = &filter {
        entries.retain(|entry| entry.artifact_type.as_ref() == Some(wanted));
    }
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
    let mut response = json(StatusCode::OK, index.to_string());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(INDEX));
    if filter.is_some() {
        response.headers_mut().insert(FILTERS_APPLIED, HeaderValue::from_static("artifactType"));
    }
    Ok(response)
}

/// Cuts the page out of a sorted list that `n` and `last` ask for, and returns the query of the next one, if any.
fn page(mut names: Vec<String>, query: &Query) -> Result<(Vec<String>, Option<String>), Problem> {
    if let Some(last) = query.get("last") {
        names.drain(..names.partition_point(|name| *name <= last));
    }
    let Some(count) = query.get("n") else { return Ok((names, None)) };
    let count: usize = count.parse().map_err(|_| Problem::size_invalid("n is not a number"))?;
    if names.len() <= count {
        return Ok((names, None));
    }
    names.truncate(count);
    let next = names.last().map(|last| {
        form_urlencoded::Serializer::new(String::new())
            .append_pair("n", &count.to_string())
            .append_pair("last", last)
            .finish()
    });
    Ok((names, next))
}
