//! TOML as written → checked [`Config`].
//!
//! [`load`] reads a file, applies `--set table.key=value` overrides, refuses unknown keys with the nearest known one,
//! fills the defaults that depend on other keys and checks every range and divisibility. Code further right never
//! checks a config again.

mod check;
mod schema;
mod table;

pub use schema::*;
pub use table::Key;

use crate::error::{Context, Result, anyhow, bail};
use std::path::Path;
use toml::{Table, Value};

/// Reads and checks the config file at `path` with `overrides`, each `table.key=value`.
pub fn load(path: &Path, overrides: &[String]) -> Result<Config> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the config {}", path.display()))?;
    parse(&text, overrides).with_context(|| format!("in the config {}", path.display()))
}

/// As [`load`], from the text of a config file.
pub fn parse(text: &str, overrides: &[String]) -> Result<Config> {
    let mut written: Table = toml::from_str(text)?;
    for setting in overrides {
        set(&mut written, setting)?;
    }
    refuse_unknown_keys(&written)?;
    let mut config = Config::default();
    for (name, value) in written {
        read_table(&mut config, &name, value)?;
    }
    check::resolve(&mut config);
    check::check(&config)?;
    Ok(config)
}

/// The config as a TOML document that [`parse`] reads back to the same value.
pub fn to_toml(config: &Config) -> String {
    toml::to_string(config).expect("a config is always a TOML table")
}

/// Applies one override. The value is read as TOML; what is not TOML is taken as a string (`data.dir=corpus`).
fn set(written: &mut Table, setting: &str) -> Result<()> {
    let malformed = || anyhow!("--set {setting}: expected table.key=value, as in --set optimizer.lr=3e-4");
    let (path, text) = setting.split_once('=').ok_or_else(malformed)?;
    let (table, key) = path.trim().split_once('.').ok_or_else(malformed)?;
    let value = toml::from_str::<Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(text.trim().to_owned()));
    let entry = written.entry(table).or_insert_with(|| Value::Table(Table::new()));
    let entry = entry.as_table_mut().ok_or_else(malformed)?;
    entry.insert(key.trim().to_owned(), value);
    Ok(())
}

fn refuse_unknown_keys(written: &Table) -> Result<()> {
    for (name, value) in written {
        let Some((_, _, keys)) = TABLES.iter().find(|(known, ..)| known == name) else {
            bail!("unknown table [{name}]{}", nearest(name, TABLES.iter().map(|t| t.0)));
        };
        let Value::Table(table) = value else {
            bail!("{name} must be a table: write [{name}] on a line of its own");
        };
        for key in table.keys() {
            if !keys.iter().any(|known| known.name == key) {
                bail!("unknown key {name}.{key}{}", nearest(key, keys.iter().map(|k| k.name)));
            }
        }
    }
    Ok(())
}

/// "; did you mean `x`?" for the known word nearest to `word`, or the list of all of them.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let best = known.clone().map(|k| (strsim::damerau_levenshtein(word, k), k)).min();
    match best {
        Some((distance, k)) if distance <= 1 + word.len() / 3 => format!("; did you mean `{k}`?"),
        _ => format!("; known: {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// Reads one table; an integer is taken where a float is expected, and an error names table and key.
fn read_table(config: &mut Config, name: &str, value: Value) -> Result<()> {
    fn read<T: serde::de::DeserializeOwned>(name: &str, value: Value) -> Result<T> {
        let Value::Table(table) = value else { unreachable!("checked in refuse_unknown_keys") };
        for (key, value) in &table {
            // One key at a time, so that the message can name it.
            let alone = Table::from_iter([(key.clone(), value.clone())]);
            T::deserialize(Value::Table(alone)).map_err(|e| {
                let why = e.to_string();
                anyhow!("{name}.{key} = {value}: {}", why.lines().next().unwrap_or_default())
            })?;
        }
        T::deserialize(Value::Table(table)).map_err(|e| anyhow!("[{name}]: {e}"))
    }
    match name {
        "run" => config.run = read(name, value)?,
        "data" => config.data = read(name, value)?,
        "model" => config.model = read(name, value)?,
        "levels" => config.levels = read(name, value)?,
        "cycle" => config.cycle = read(name, value)?,
        "optimizer" => config.optimizer = read(name, value)?,
        "schedule" => config.schedule = read(name, value)?,
        "parallel" => config.parallel = read(name, value)?,
        "checkpoint" => config.checkpoint = read(name, value)?,
        "log" => config.log = read(name, value)?,
        _ => unreachable!("checked in refuse_unknown_keys"),
    }
    Ok(())
}

impl Config {
    /// N_l: rows (blocks) of level `l`.
    pub fn rows(&self, level: usize) -> usize {
        self.model.depth / self.levels.factor.pow(level as u32)
    }

    /// Whether a descent after `step` steps adds a coherence term.
    pub fn is_coherent(&self, step: u64) -> bool {
        self.levels.coherence && step as f64 >= self.levels.coherence_from * self.run.steps as f64
    }

    /// h_l: step size of level `l`.
    pub fn step_size(&self, level: usize) -> f64 {
        self.horizon() / self.rows(level) as f64
    }

    /// B_l: sequences in a global batch on level `l`.
    pub fn batch(&self, level: usize) -> usize {
        self.levels.batch.as_ref().expect("resolved by config::parse")[level]
    }

    /// T_l: tokens in a sequence on level `l`.
    pub fn context(&self, level: usize) -> usize {
        self.levels.context.as_ref().expect("resolved by config::parse")[level]
    }

    /// The smallest and the largest B_l.
    pub fn batches(&self) -> (usize, usize) {
        let batches = (0..self.levels.count).map(|level| self.batch(level));
        (batches.clone().min().expect("at least one level"), batches.max().expect("at least one level"))
    }

    /// Steps before the last `cycle.finish` share of them, which `v`, `w` and `f` spend on the fine level.
    pub fn cycled_steps(&self) -> u64 {
        let finish = (self.run.steps as f64 * self.cycle.finish).round() as u64;
        self.run.steps - finish.min(self.run.steps)
    }

    /// End of the time interval.
    pub fn horizon(&self) -> f64 {
        self.model.horizon.expect("resolved by config::parse")
    }
}

/// The config reference as Markdown: one table of keys a config table.
pub fn reference() -> String {
    use std::fmt::Write;
    let mut out = String::from(REFERENCE_HEAD);
    for (name, doc, keys) in TABLES {
        let _ = write!(out, "\n## [{name}]\n\n{}\n\n| key | default | meaning |\n| --- | --- | --- |\n", doc.trim());
        for key in *keys {
            let default = documented_default(key.default);
            let _ = writeln!(out, "| `{}` | {default} | {} |", key.name, key.doc.trim().replace('|', "\\|"));
        }
    }
    out
}

const REFERENCE_HEAD: &str = "# Config reference

A config is a TOML file; what is not given has the default below. `--set table.key=value` overrides a key on the command
line. The resolved config is written to the run directory. This page is generated (`make docs`).
";

/// A default as TOML shows it: `CycleKind::Flat` → `\"flat\"`, `None` and empty paths → a dash.
fn documented_default(source: &str) -> String {
    match source {
        "None" | "PathBuf::new()" => "–".to_owned(),
        "Vec::new()" => "`[]`".to_owned(),
        _ => match source.split_once("::") {
            Some((_, variant)) => format!("`\"{}\"`", variant.to_lowercase()),
            None => format!("`{source}`"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: &str = "[data]\ndir = 'x'\n";

    fn error(text: &str) -> String {
        format!("{:#}", parse(text, &[]).unwrap_err())
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_known_one() {
        assert_eq!(error("[model]\nwitdh = 3"), "unknown key model.witdh; did you mean `width`?");
        assert_eq!(error("[modle]\nwidth = 3"), "unknown table [modle]; did you mean `model`?");
    }

    #[test]
    fn a_wrong_type_names_the_key() {
        let e = error("[data]\ndir = 'x'\n[model]\nwidth = 'wide'");
        assert!(e.starts_with("model.width = \"wide\""), "{e}");
    }

    #[test]
    fn overrides_are_read_as_toml_or_as_strings() {
        let overrides = ["model.depth=4", "optimizer.lr=1", "data.dir=/a b", "cycle.fractions=[0.5, 0.5]"];
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        let text = "[levels]\ncount = 2\n[cycle]\nkind='cascade'";
        let config = parse(text, &overrides).unwrap();
        assert_eq!(config.model.depth, 4);
        assert_eq!(config.optimizer.lr, 1.0);
        assert_eq!(config.data.dir, Path::new("/a b"));
        assert_eq!(config.cycle.fractions, Some(vec![0.5, 0.5]));
    }

    #[test]
    fn a_resolved_config_reads_back_to_itself() {
        let text = format!("{DATA}[model]\ndepth = 8\n[levels]\ncount = 3\n[cycle]\nkind = 'cascade'");
        let config = parse(&text, &[]).unwrap();
        assert_eq!(parse(&to_toml(&config), &[]).unwrap(), config);
        assert_eq!(config.horizon(), 8.0);
        assert_eq!(config.rows(2), 2);
        assert_eq!(config.step_size(2), 4.0);
    }

    #[test]
    fn ranges_and_divisibility_are_checked() {
        for (text, expected) in [
            ("[model]\nwidth = 100", "model.heads"),
            ("[levels]\ncount = 4", "model.depth"),
            ("[optimizer]\nlr = -1", "optimizer.lr"),
            ("[optimizer]\nlr = nan", "optimizer.lr"),
            ("[data]\nbatch = 0", "data.batch"),
            ("[cycle]\nkind = 'cascade'\nfractions = [0.5, 0.1]\n[levels]\ncount = 2", "cycle.fractions"),
            ("[levels]\ncount = 2\npull = 0.1", "levels.transfer"),
            ("[levels]\ncount = 2\nnoise = 0.1\nupdate = 'mix'", "levels.noise"),
            ("[levels]\ncoherence_from = 2", "levels.coherence_from"),
            ("[levels]\ncount = 2\nbatch = [16]", "levels.batch"),
            ("[levels]\ncount = 2\nbatch = [8, 8]", "data.batch"),
            ("[levels]\ncount = 2\nbatch = [16, 0]", "levels.batch"),
            ("[levels]\ncount = 2\ncontext = [256]", "levels.context"),
            ("[levels]\ncount = 2\ncontext = [128, 128]", "data.context"),
            ("[levels]\ncount = 2\ncontext = [256, 0]", "levels.context"),
            ("[levels]\ncount = 2\ncontext = [256, 100]", "levels.context"),
            ("[cycle]\nkind = 'paper'\n[levels]\ncount = 2", "levels.transfer"),
            ("[parallel]\nzero = 7", "parallel.zero"),
            ("[parallel]\nzero = 1\nsync_every = 2", "parallel.sync_every"),
            (
                "[parallel]\nzero = 1\nplacement = 'beside'\n[levels]\ncount = 2\n[cycle]\nkind = 'v'",
                "parallel.placement",
            ),
            ("[parallel]\nsync_every = 0", "parallel.sync_every"),
            ("[parallel]\ngroups = [1, 1]", "parallel.groups"),
            ("[parallel]\nplacement = 'cosets'\n[levels]\ncount = 2\n[cycle]\nkind = 'cascade'", "levels.transfer"),
            ("[parallel]\nplacement = 'cosets'\n[levels]\ntransfer = 'injection'", "levels.count"),
            (
                "[parallel]\nplacement = 'cosets'\n[levels]\ncount = 2\ntransfer = 'injection'\ncoset = 'random'\n[cycle]\nkind = 'cascade'",
                "levels.coset",
            ),
            (
                "[parallel]\nplacement = 'cosets'\ngroups = [1, 1, 1]\n[levels]\ncount = 2\ntransfer = 'injection'\n[cycle]\nkind = 'paper'",
                "parallel.groups",
            ),
            (
                "[parallel]\nplacement = 'beside'\n[levels]\ncount = 2\ntransfer = 'injection'\n[cycle]\nkind = 'v'",
                "levels.transfer",
            ),
            ("[parallel]\nplacement = 'beside'\n[levels]\ncount = 2\n[cycle]\nkind = 'cascade'", "cycle.kind"),
            (
                "[parallel]\nplacement = 'beside'\n[levels]\ncount = 2\n[cycle]\nkind = 'phases'\n\
                 phases = [{ level = 1, steps = 400 }, { level = 0, steps = 600 }]",
                "cycle.phases",
            ),
            (
                "[parallel]\nplacement = 'beside'\ngroups = [1]\n[levels]\ncount = 2\n[cycle]\nkind = 'v'",
                "parallel.groups",
            ),
        ] {
            let text =
                if text.contains("[data]") { text.replace("[data]", DATA.trim()) } else { format!("{DATA}{text}") };
            let e = error(&text);
            assert!(e.contains(expected), "{text}: {e}");
        }
    }
}
