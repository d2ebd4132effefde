//! What people see: a progress bar where a terminal watches, plain lines elsewhere, and the same lines in `log.txt`.

use indicatif::{ProgressBar, ProgressStyle};
use std::fs::File;
use std::io::{IsTerminal, Result, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tracing_subscriber::fmt::MakeWriter;

/// Where log lines go. Clones share one sink.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Sink>>);

#[derive(Default)]
struct Sink {
    log: Option<File>,
    bar: Option<ProgressBar>,
}

impl Console {
    /// Sends all `tracing` events to this console: plain text on rank 0, errors only on the others.
    pub fn install(rank: usize) -> Console {
        let console = Console::default();
        let level = if rank == 0 { tracing::Level::INFO } else { tracing::Level::ERROR };
        // A second installation in one process (tests) keeps the first.
        let _ = tracing_subscriber::fmt()
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .event_format(Plain)
            .with_max_level(level)
            .with_writer(console.clone())
            .try_init();
        console
    }

    /// Also appends every line to `log`.
    pub fn log_to(&self, log: File) {
        self.sink().log = Some(log);
    }

    /// Shows a bar over `steps` steps if stderr is a terminal.
    pub fn start_bar(&self, steps: u64, done: u64) {
        if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{bar:32} {pos}/{len} steps  {msg}  eta {eta}")
                .expect("the template is constant and valid");
            self.sink().bar = Some(ProgressBar::new(steps).with_style(style).with_position(done));
        }
    }

    pub fn advance_bar(&self, step: u64, message: impl FnOnce() -> String) {
        if let Some(bar) = &self.sink().bar {
            bar.set_position(step);
            bar.set_message(message());
        }
    }

    pub fn finish_bar(&self) {
        if let Some(bar) = self.sink().bar.take() {
            bar.finish_and_clear();
        }
    }

    fn sink(&self) -> MutexGuard<'_, Sink> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Console {
    fn write(&mut self, line: &[u8]) -> Result<usize> {
        let mut sink = self.sink();
        let print = || std::io::stderr().write_all(line);
        match &sink.bar {
            Some(bar) => bar.suspend(print)?,
            None => print()?,
        }
        if let Some(log) = &mut sink.log {
            log.write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> Result<()> {
        std::io::stderr().flush()
    }
}

impl MakeWriter<'_> for Console {
    type Writer = Console;

    fn make_writer(&self) -> Console {
        self.clone()
    }
}

/// Information as it is; warnings and errors with their level in front.
struct Plain;

impl<S, N> tracing_subscriber::fmt::FormatEvent<S, N> for Plain
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    N: for<'a> tracing_subscriber::fmt::FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &tracing_subscriber::fmt::FmtContext<'_, S, N>,
        mut writer: tracing_subscriber::fmt::format::Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        match *event.metadata().level() {
            tracing::Level::ERROR => write!(writer, "error: ")?,
            tracing::Level::WARN => write!(writer, "warning: ")?,
            _ => {}
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
