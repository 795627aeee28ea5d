//! `--engine`: how an image becomes visible, where that is not left to the probe.

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser as _},
};
use loris_mount::engine::Engine;

/// How an image becomes visible.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct EngineArgument {
    /// How the image becomes visible; without, the best way that works here, see `loris doctor`
    #[arg(long, env = "LORIS_ENGINE", value_parser = PossibleValuesParser::new(Engine::ALL.map(Engine::name)).try_map(|name| name.parse::<Engine>()))]
    pub engine: Option<Engine>,
}

impl EngineArgument {
    /// Returns it as arguments of another process of this program.
    pub(crate) fn arguments(self) -> Vec<String> {
        self.engine.map_or_else(Vec::new, |engine| vec!["--engine".to_owned(), engine.to_string()])
    }
}
