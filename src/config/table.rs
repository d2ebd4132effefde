//! One declaration per config table: the struct, its defaults, its known keys and its documentation.
//!
//! `docs/CONFIG.md` is generated from the same declarations, so the reference cannot drift from the code.

/// One documented key of a config table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub name: &'static str,
    /// The default as written in the source.
    pub default: &'static str,
    pub doc: &'static str,
}

/// Declares a config table. Every field has a doc comment and a default; unknown keys are refused by
/// [`super::parse`] before serde sees the table, with the nearest known key.
macro_rules! table {
    ($(#[doc = $table_doc:expr])* $name:ident { $( $(#[doc = $doc:expr])+ $field:ident : $ty:ty = $default:expr ),* $(,)? }) => {
        $(#[doc = $table_doc])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct $name {
            $( $(#[doc = $doc])+ #[serde(skip_serializing_if = "crate::config::table::Unset::is_unset")] pub $field: $ty ),*
        }
        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default ),* }
            }
        }
        impl $name {
            pub const DOC: &str = concat!($($table_doc),*);
            pub const KEYS: &[crate::config::table::Key] = &[ $( crate::config::table::Key {
                name: stringify!($field),
                default: stringify!($default),
                doc: concat!($($doc),+),
            } ),* ];
        }
    };
}
pub(super) use table;

/// TOML has no null: an unset `Option` is left out when a config is written.
pub(super) trait Unset {
    fn is_unset(&self) -> bool {
        false
    }
}

impl<T> Unset for Option<T> {
    fn is_unset(&self) -> bool {
        self.is_none()
    }
}

macro_rules! always_set {
    ($($ty:ty),*) => { $( impl Unset for $ty {} )* };
}
always_set!(bool, u64, usize, f64, String, std::path::PathBuf);
impl<T> Unset for Vec<T> {}

/// An enum written in TOML as one of a few lower-case words.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $( $(#[doc = $doc:expr])+ $variant:ident = $word:literal ),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $name { $( $(#[doc = $doc])+ #[serde(rename = $word)] $variant ),* }
        impl $name {
            pub const ALL: &[$name] = &[ $( $name::$variant ),* ];
            pub fn name(self) -> &'static str {
                match self { $( $name::$variant => $word ),* }
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
        impl crate::config::table::Unset for $name {}
    };
}
pub(super) use words;
