//! Any text as a reference, an image's name and a platform: what is displayed reads the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loris_oci::{ImageName, Platform, Reference};

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string().parse::<Reference>().expect("the short form"), reference);
        assert_eq!(reference.canonical().parse::<Reference>().expect("the long form"), reference);
        assert!(!reference.repository().is_empty() && !reference.repository().contains(".."));
        assert!(!reference.api_host().contains('/'));
    }
    if let Ok(name) = text.parse::<ImageName>() {
        assert_eq!(name.to_string().parse::<ImageName>().expect("what is displayed"), name);
    }
    if let Ok(platform) = text.parse::<Platform>() {
        assert_eq!(platform.to_string().parse::<Platform>().expect("what is displayed"), platform);
        assert_eq!(platform.rank_on(&platform), Some(0));
    }
});
