//! Layer indexes as one file-system tree: what a mount shows.
//!
//! Two forms. [`Tree::of_layer`] shows one layer as a lower directory of overlayfs: OCI whiteouts (`.wh.name`) become
//! character devices 0:0, opaque directories (`.wh..wh..opq`) get overlayfs' attribute. [`Tree::merged`] applies
//! whiteouts and opaque directories itself and shows the whole image, which needs no overlayfs and no root.
//!
//! Landmarks and the table of contents at the root of an eStargz layer are not shown, nor are `trusted.overlay.*` and
//! `user.overlay.*` attributes of an image, which would steer overlayfs.
