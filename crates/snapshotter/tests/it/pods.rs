//! A pod on a lazily pulled image, through the CRI API as kubelet uses it: pulled with kubelet's credentials, sandbox,
//! container, log.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use loris_lazy::{OpenOptions, Store};
use loris_mount::pager::{OnDeath, PagerOptions};
use loris_oci::{
    ImageSource as _, Reference,
    auth::Credentials,
    registry::{Client, Config},
};
use loris_snapshotter::{
    Daemon, ahead,
    containerd::{Place, Store as ContainerdStore},
    content,
    daemon::{self, Started},
    keychain::{Keychains, Settings},
    proto::cri::{ImageSpec, RemoveImageRequest, image_service_client::ImageServiceClient},
    remote,
};
use loris_testkit::registry::{DockerRegistry, DockerRegistryOptions};
use prost::Message;
use tonic::transport::Channel;

use crate::{
    containerd::Containerd,
    cri::{PASSWORD, USER, client, config, password, pull, raw},
    image::{self, CONTENT, FILE},
};

/// The parts of the runtime service that are needed here. Field numbers are those of the CRI API, version 1.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Metadata {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "2")]
        pub uid: String,
        #[prost(string, tag = "3")]
        pub namespace: String,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct NamespaceOption {
        #[prost(int32, tag = "1")]
        pub network: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct SandboxSecurity {
        #[prost(message, optional, tag = "1")]
        pub namespaces: Option<NamespaceOption>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct LinuxSandbox {
        #[prost(message, optional, tag = "2")]
        pub security: Option<SandboxSecurity>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Sandbox {
        #[prost(message, optional, tag = "1")]
        pub metadata: Option<Metadata>,
        #[prost(string, tag = "3")]
        pub log_directory: String,
        #[prost(message, optional, tag = "8")]
        pub linux: Option<LinuxSandbox>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct RunSandbox {
        #[prost(message, optional, tag = "1")]
        pub config: Option<Sandbox>,
    }

    /// Of several messages that have it alone.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Id {
        #[prost(string, tag = "1")]
        pub id: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ContainerMetadata {
        #[prost(string, tag = "1")]
        pub name: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ContainerSecurity {
        #[prost(message, optional, tag = "3")]
        pub namespaces: Option<NamespaceOption>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct LinuxContainer {
        #[prost(message, optional, tag = "2")]
        pub security: Option<ContainerSecurity>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Container {
        #[prost(message, optional, tag = "1")]
        pub metadata: Option<ContainerMetadata>,
        /// With the image's name as its only field.
        #[prost(message, optional, tag = "2")]
        pub image: Option<Id>,
        #[prost(string, repeated, tag = "3")]
        pub command: Vec<String>,
        #[prost(string, tag = "11")]
        pub log_path: String,
        #[prost(message, optional, tag = "15")]
        pub linux: Option<LinuxContainer>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct CreateContainer {
        #[prost(string, tag = "1")]
        pub sandbox: String,
        #[prost(message, optional, tag = "2")]
        pub config: Option<Container>,
        #[prost(message, optional, tag = "3")]
        pub sandbox_config: Option<Sandbox>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ContainerStatusResponse {
        #[prost(message, optional, tag = "1")]
        pub status: Option<ContainerStatus>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ContainerStatus {
        #[prost(int32, tag = "3")]
        pub state: i32,
        #[prost(int32, tag = "7")]
        pub exit_code: i32,
        #[prost(string, tag = "10")]
        pub reason: String,
        #[prost(string, tag = "11")]
        pub message: String,
    }
}

/// The network of the node: pods of their own would need CNI plugins.
const NODE: i32 = 2;
/// The state of a container that has ended.
const EXITED: i32 = 2;

async fn call<T: Message + Default>(runtime: &Channel, method: &'static str, request: impl Message) -> T {
    let path: &'static str = Box::leak(format!("/runtime.v1.RuntimeService/{method}").into_boxed_str());
    let message: &'static [u8] = Box::leak(request.encode_to_vec().into_boxed_slice());
    let answer: Bytes = raw(runtime, path, message).await.unwrap_or_else(|status| panic!("{method}: {status}"));
    T::decode(answer).unwrap()
}

async fn start(place: &Path, keychains: &Keychains) -> Box<Daemon> {
    let images = remote::Settings {
        client: Client::new(Config { keychains: keychains.list(), ..config() }).unwrap(),
        store: Store::open(&place.join("store")).unwrap(),
        open: OpenOptions::default(),
        patience: Duration::from_secs(30),
        foresee: true,
    };
    let pager = PagerOptions {
        patience: Duration::from_secs(30),
        register: place.join("register"),
        on_death: OnDeath::Clean(Vec::new()),
        keeper: None,
        note: None,
        log: None,
    };
    let settings = daemon::Settings {
        root: place.join("snapshotter"),
        address: place.join("snapshotter.sock"),
        listener: None,
        images,
        keeps_address: false,
        image_service: keychains.image_service(),
        ahead: ahead::Settings { prefetch: true, complete: None },
        content: content::Settings { address: place.join("socket"), complete_namespaces: Vec::new() },
        mount_options: Vec::new(),
        engine: None,
        pager,
        is_managed: false,
    };
    match Daemon::start(settings, None).await.unwrap() {
        Started::Serving(daemon) => daemon,
        Started::PassedOn => panic!("passed on"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_on_an_image_that_was_pulled_lazily() {
    let test = "a_pod_runs_on_an_image_that_was_pulled_lazily";
    let credentials = Some((USER.to_owned(), PASSWORD.to_owned()));
    let options = DockerRegistryOptions { credentials, ..DockerRegistryOptions::default() };
    let Some(registry) = DockerRegistry::start(test, &options).unwrap() else { return };
    let place = tempfile::Builder::new().prefix("loris-pod-").tempdir().unwrap();
    let at = place.path().canonicalize().unwrap();
    if !loris_testkit::require_root(test) {
        return;
    }
    let name = format!("{}/team/pod:1", registry.address());
    let reference: Reference = name.parse().unwrap();
    let given = Credentials::Basic { username: USER.into(), password: PASSWORD.into() };
    let ours = Config { credentials: Some(given), ..config() };
    image::push_with(&at, ours.clone(), &reference, &["/bin/sh", "/bin/sleep"]).await;

    let state = at.join("state");
    std::fs::create_dir(&state).unwrap();
    let mut settings = Settings::default();
    settings.cri.enable_keychain = true;
    settings.cri.image_service_path = at.join("socket");
    let keychains = Keychains::new(&settings, &state).unwrap();
    let daemon = start(&at, &keychains).await;
    // A test may have less rights than a node: a score of -998 takes CAP_SYS_RESOURCE.
    let cri = format!("sandbox_image = \"{name}\"\nrestrict_oom_score_adj = true");
    let plugin = format!(
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"loris\"\ndisable_snapshot_annotations = false\n\
         [proxy_plugins.loris]\ntype = \"snapshot\"\naddress = \"{}\"\n",
        at.join("snapshotter.sock").display()
    );
    let work = async {
        let containerd = tokio::task::block_in_place(|| Containerd::start_with(test, &at, &cri, &plugin));
        let Some(containerd) = containerd else { return };
        pod(&at, &containerd, &name, &ours).await;
        let images = ImageServiceClient::new(client(&at.join("snapshotter.sock")));
        let image = Some(ImageSpec { image: name.clone() });
        images.clone().remove_image(RemoveImageRequest { image }).await.unwrap();
        crate::until("the removal of snapshots", || async {
            daemon.snapshots().list(|_| true).await.unwrap().is_empty()
        })
        .await;
    };
    tokio::select! {
        served = daemon.serve() => panic!("{served:?}"),
        () = work => {}
    }
    tokio::task::spawn_blocking(move || daemon.take_down()).await.unwrap();
}

async fn pod(at: &Path, containerd: &Containerd, name: &str, registry: &Config) {
    let kubelets = client(&at.join("snapshotter.sock"));
    pull(&kubelets, name, password(PASSWORD)).await.unwrap();
    let runtime = client(&containerd.socket());
    let namespaces = Some(wire::NamespaceOption { network: NODE });
    let metadata = |name: &str| {
        let uid = format!("{name}-{}", std::process::id());
        Some(wire::Metadata { name: name.to_owned(), uid, namespace: "tests".to_owned() })
    };
    let security = Some(wire::SandboxSecurity { namespaces });
    let config = wire::Sandbox {
        metadata: metadata("pod"),
        log_directory: at.join("logs").display().to_string(),
        linux: Some(wire::LinuxSandbox { security }),
    };
    let sandbox: wire::Id = call(&runtime, "RunPodSandbox", wire::RunSandbox { config: Some(config.clone()) }).await;
    let container = wire::Container {
        metadata: Some(wire::ContainerMetadata { name: "reader".to_owned() }),
        image: Some(wire::Id { id: name.to_owned() }),
        command: ["/bin/sh", "-c"]
            .map(str::to_owned)
            .into_iter()
            .chain([format!("read -r line < /{FILE}; echo \"$line\"")])
            .collect(),
        log_path: "reader.log".to_owned(),
        linux: Some(wire::LinuxContainer { security: Some(wire::ContainerSecurity { namespaces }) }),
    };
    let request =
        wire::CreateContainer { sandbox: sandbox.id.clone(), config: Some(container), sandbox_config: Some(config) };
    let created: wire::Id = call(&runtime, "CreateContainer", request).await;
    let () = call(&runtime, "StartContainer", created.clone()).await;
    let runtime_of = &runtime;
    let id = &created;
    crate::until("the end of the container", || async move {
        let answer: wire::ContainerStatusResponse = call(runtime_of, "ContainerStatus", id.clone()).await;
        answer.status.is_some_and(|status| {
            assert!(status.state != EXITED || status.exit_code == 0, "{status:?}");
            status.state == EXITED
        })
    })
    .await;
    let log = std::fs::read_to_string(at.join("logs/reader.log")).unwrap();
    assert!(log.contains(std::str::from_utf8(CONTENT).unwrap().trim()), "{log}");

    // It was lazy: containerd has not got the layer.
    let source = Client::new(registry.clone()).unwrap().source(&name.parse().unwrap());
    let manifest = source.root().await.unwrap().manifest(&loris_format::limits::Limits::default()).unwrap();
    let place = Place { address: containerd.socket(), namespace: "k8s.io".to_owned() };
    let store = ContainerdStore::connect(&place).await.unwrap();
    for layer in &manifest.layers {
        assert!(store.info(&layer.digest).await.unwrap().is_none(), "containerd has pulled {}", layer.digest);
    }
    for (method, request) in [("StopPodSandbox", &sandbox), ("RemovePodSandbox", &sandbox)] {
        let () = call(&runtime, method, request.clone()).await;
    }
}
