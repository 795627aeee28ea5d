//! What a token must allow: `repository:NAME:pull,push`, several of them.
//!
//! Source: distribution's token authentication specification, section "Requesting a Token".

use std::collections::{BTreeMap, BTreeSet};

/// Most scopes that are taken from a challenge; a request needs one or two.
const MAX_SCOPES: usize = 16;

/// A set of scopes. Two that allow the same are equal, whatever the order in which they were written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Scopes(BTreeMap<String, BTreeSet<String>>);

impl Scopes {
    /// Returns the scope of one repository.
    pub(super) fn repository(name: &str, actions: &[&str]) -> Self {
        Self::default().and_repository(name, actions)
    }

    /// Adds a repository's.
    pub(super) fn and_repository(mut self, name: &str, actions: &[&str]) -> Self {
        let of_repository = self.0.entry(format!("repository:{name}")).or_default();
        of_repository.extend(actions.iter().map(|action| (*action).to_owned()));
        self
    }

    /// Adds what a challenge asks for.
    pub(super) fn merge(&mut self, challenge: &str) {
        for scope in challenge.split_ascii_whitespace().take(MAX_SCOPES) {
            if let Some((resource, actions)) = scope.rsplit_once(':') {
                let actions = actions.split(',').filter(|action| !action.is_empty()).map(str::to_owned);
                self.0.entry(resource.to_owned()).or_default().extend(actions);
            }
        }
    }

    /// Returns each scope as the token server expects it.
    pub(super) fn texts(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(resource, actions)| {
            let actions: Vec<&str> = actions.iter().map(String::as_str).collect();
            format!("{resource}:{}", actions.join(","))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_sets() {
        let mut scopes = Scopes::repository("a/b", &["push", "pull"]).and_repository("c", &["pull"]);
        scopes.merge("repository:a/b:pull,delete repository(plugin):d:pull junk registry:catalog:*");
        let texts: Vec<String> = scopes.texts().collect();
        let expected =
            ["registry:catalog:*", "repository(plugin):d:pull", "repository:a/b:delete,pull,push", "repository:c:pull"];
        assert_eq!(texts, expected);
        assert_eq!(Scopes::repository("a", &["pull", "push"]), Scopes::repository("a", &["push", "pull", "pull"]));
    }
}
