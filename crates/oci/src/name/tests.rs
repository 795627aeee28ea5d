use proptest::prelude::*;

use super::*;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn selector(name: Option<&str>, index: Option<usize>, digest: Option<&str>) -> Selector {
    Selector { name: name.map(str::to_owned), index, digest: digest.map(|digest| digest.parse().unwrap()) }
}

#[test]
fn transports_are_skopeos() {
    let tag_and_digest = format!("oci:d:t@{DIGEST}");
    let digest = format!("oci-archive:d@{DIGEST}");
    let registry = |text: &str| ImageName::Registry(text.parse().unwrap());
    let layout = |path: &str, selector| ImageName::Layout { path: path.into(), selector };
    let archive = |path: &str, selector| ImageName::OciArchive { path: path.into(), selector };
    let docker = |path: &str, selector| ImageName::DockerArchive { path: path.into(), selector };
    let containerd = |namespace: Option<&str>, reference: &str| ImageName::Containerd {
        namespace: namespace.map(str::to_owned),
        reference: reference.parse().unwrap(),
    };
    for (text, name, displayed) in [
        ("-", ImageName::Standard, "-"),
        ("alpine", registry("alpine"), "alpine:latest"),
        ("docker://alpine:3", registry("alpine:3"), "alpine:3"),
        // Docker's own image.
        ("docker:20", registry("docker.io/library/docker:20"), "docker:20"),
        ("docker://oci:1", registry("docker.io/library/oci:1"), "docker://oci:1"),
        ("oci:/a/b", layout("/a/b", selector(None, None, None)), "oci:/a/b"),
        ("oci:a:x/y:1.2", layout("a", selector(Some("x/y:1.2"), None, None)), "oci:a:x/y:1.2"),
        ("oci:a:", layout("a", selector(None, None, None)), "oci:a"),
        ("oci:a:@3", layout("a", selector(None, Some(3), None)), "oci:a:@3"),
        (&tag_and_digest, layout("d", selector(Some("t"), None, Some(DIGEST))), &tag_and_digest),
        (&digest, archive("d", selector(None, None, Some(DIGEST))), &digest),
        ("oci-archive:f.tar:v1", archive("f.tar", selector(Some("v1"), None, None)), "oci-archive:f.tar:v1"),
        (
            "docker-archive:f.tar:alpine",
            docker("f.tar", selector(Some("docker.io/library/alpine:latest"), None, None)),
            "docker-archive:f.tar:docker.io/library/alpine:latest",
        ),
        ("containerd:alpine", containerd(None, "alpine"), "containerd:docker.io/library/alpine:latest"),
        (
            "containerd:moby/alpine:3",
            containerd(Some("moby"), "alpine:3"),
            "containerd:moby/docker.io/library/alpine:3",
        ),
        ("containerd:quay.io/a/b:1", containerd(None, "quay.io/a/b:1"), "containerd:quay.io/a/b:1"),
        (
            "containerd:k8s.io/registry.k8s.io/pause:3",
            containerd(Some("k8s.io"), "registry.k8s.io/pause:3"),
            "containerd:k8s.io/registry.k8s.io/pause:3",
        ),
        (
            "containerd:default/quay.io/my.team/app:1",
            containerd(Some("default"), "quay.io/my.team/app:1"),
            "containerd:default/quay.io/my.team/app:1",
        ),
        (
            "containerd:my.space/localhost:5000/a/b:1",
            containerd(Some("my.space"), "localhost:5000/a/b:1"),
            "containerd:my.space/localhost:5000/a/b:1",
        ),
        (
            "containerd:localhost:5000/my.team/b:1",
            containerd(None, "localhost:5000/my.team/b:1"),
            "containerd:localhost:5000/my.team/b:1",
        ),
        (
            "containerd:localhost:5000/a/b:1",
            containerd(None, "localhost:5000/a/b:1"),
            "containerd:localhost:5000/a/b:1",
        ),
        (
            "containerd:default/localhost:5000/a/b:1",
            containerd(Some("default"), "localhost:5000/a/b:1"),
            "containerd:default/localhost:5000/a/b:1",
        ),
        ("docker-archive:f:@0", docker("f", selector(None, Some(0), None)), "docker-archive:f:@0"),
    ] {
        let parsed: ImageName = text.parse().unwrap();
        assert_eq!(parsed, name, "{text}");
        assert_eq!(parsed.to_string(), displayed);
    }
}

#[test]
fn names_that_mean_nothing_say_what_would() {
    for (text, message) in [
        ("dir:/x", "oci:DIR"),
        ("containers-storage:alpine", "podman save"),
        ("containerd:", "empty"),
        ("containerd:a--b/alpine", "namespace"),
        ("containerd:/alpine", "namespace"),
        ("containerd:default/Alpine", "capital"),
        ("containerd:quay.io/my.team/app:1", "containerd:default/quay.io/..."),
        ("containerd:localhost/docker.io/app/b", "CONTAINERD_NAMESPACE=localhost"),
        ("docker-daemon:alpine:latest", "docker save"),
        ("./x", "oci:DIR"),
        ("/x.tar", "oci-archive:FILE"),
        ("oci:", "path"),
        ("oci::x", "path"),
        ("oci:d:@x", "number"),
        ("oci:d:@", "number"),
        ("oci:d:@99999999999999999999999", "number"),
        ("oci:d:a b", "letters and digits"),
        ("oci:d:-a", "letters and digits"),
        ("oci:d:a//b", "letters and digits"),
        ("docker-archive:f:Alpine", "capital"),
        ("docker://", "empty"),
        ("", "empty"),
    ] {
        let error = text.parse::<ImageName>().unwrap_err().to_string();
        assert!(error.contains(message), "{text}: {error}");
    }
}

#[test]
fn a_name_with_its_digest_can_be_typed_again() {
    for text in [
        "alpine:3",
        "containerd:a:1",
        "containerd:k8s.io/b.c/d:2",
        "oci:d",
        "oci:d:t",
        "oci:d:@0",
        "oci-archive:f:t",
        "docker-archive:f:x:1",
    ] {
        let name = text.parse::<ImageName>().unwrap().with_digest(DIGEST.parse().unwrap());
        assert!(name.to_string().ends_with(&format!("@{DIGEST}")), "{name}");
        assert_eq!(name.to_string().parse::<ImageName>().unwrap(), name);
    }
}

proptest! {
    #[test]
    fn what_is_displayed_reads_the_same(text in "(oci:|oci-archive:|docker-archive:|containerd:|docker://|-|)[a-z0-9@:/._-]{0,20}") {
        if let Ok(name) = text.parse::<ImageName>() {
            prop_assert_eq!(name.to_string().parse::<ImageName>().unwrap(), name);
        }
    }
}
