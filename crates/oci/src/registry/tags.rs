//! Lists: the tags of a repository, the repositories of a registry.
//!
//! Source: distribution specification 1.1, section "Listing Tags"; the list of repositories is Docker's and optional.

use reqwest::Url;
use serde::Deserialize;

use super::{
    Repository,
    location::{Origin, Refused, next_page},
};
use crate::place::Error;

/// How many names are asked for at once. Registries may send fewer.
const PAGE: &str = "1000";
/// Most pages that are read: registries that ignore `n` send 100 names a page.
const MAX_PAGES: usize = 20_000;
/// Most names.
const MAX_NAMES: usize = 2_000_000;

#[derive(Deserialize)]
struct Page {
    // `null` where there is nothing, in several registries.
    #[serde(alias = "repositories")]
    tags: Option<Vec<String>>,
}

impl Repository {
    /// Returns all tags, in the registry's order.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] where there is no such repository.
    pub async fn tags(&self) -> Result<Vec<String>, Error> {
        let url = self.url(self.upstream()?, "tags/list").await?;
        self.list(url, "the list of tags").await
    }

    /// Returns the names of all repositories of this registry; few public ones tell.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] or [`Error::Denied`] where the registry does not tell.
    pub async fn catalog(&self) -> Result<Vec<String>, Error> {
        let url = self.upstream()?.url(&self.client, "_catalog").await?;
        self.list(url, "the list of repositories").await
    }

    async fn list(&self, mut url: Url, what: &str) -> Result<Vec<String>, Error> {
        url.query_pairs_mut().append_pair("n", PAGE);
        let limit = self.client.config().limits.manifest_bytes;
        let endless =
            || Error::Invalid { what: format!("{what} of {}", self.place()), detail: "it has no end".to_owned() };
        let mut names: Vec<String> = Vec::new();
        for _ in 0..MAX_PAGES {
            let asked = url.clone();
            let small = self.small(url, None, || what.to_owned(), limit).await?;
            let page: Page = serde_json::from_slice(&small.body).map_err(|error| Error::Invalid {
                what: format!("{what} of {}", self.place()),
                detail: error.to_string(),
            })?;
            names.extend(page.tags.unwrap_or_default());
            url = match next_page(&small.headers, &small.url) {
                None => return Ok(names),
                Some(next) => self.same_origin(next).await?,
            };
            if names.len() > MAX_NAMES || url == asked {
                break;
            }
        }
        Err(endless())
    }

    /// Refuses a next page that is not the registry's: it would be shown credentials.
    pub(super) async fn same_origin(&self, next: Result<Url, Refused>) -> Result<Url, Error> {
        let refused =
            |detail: String| Error::Invalid { what: format!("the next page that {} names", self.place()), detail };
        let next = next.map_err(|why| refused(why.to_string()))?;
        if Origin::of(&next) == Origin::of(self.upstream()?.base(&self.client).await?) {
            return Ok(next);
        }
        Err(refused(format!("it is at {}", Origin::of(&next).authority())))
    }
}
