//! Generates the code of containerd's protocols from the `.proto` files of a folder into another one:
//! `loris-protos PROTO_FOLDER OUTPUT_FOLDER`.

use std::{error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(protos), Some(output)) = (arguments.next(), arguments.next()) else {
        return Err("usage: loris-protos PROTO_FOLDER OUTPUT_FOLDER".into());
    };
    let mut files: Vec<PathBuf> = fs::read_dir(&protos)?.map(|entry| Ok(entry?.path())).collect::<Result<_, std::io::Error>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "proto"));
    files.sort();
    let descriptors = protox::compile(&files, [&protos])?;
    fs::create_dir_all(&output)?;
    tonic_prost_build::configure()
        // It would show secrets; src/proto.rs has another one.
        .skip_debug(["runtime.v1.AuthConfig"])
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .out_dir(&output)
        .compile_fds(descriptors)?;
    Ok(())
}
