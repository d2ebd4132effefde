//! Parquet: a document a row, in the column `text`.

use super::{Content, Piece};
use crate::error::{Context, Result, bail};
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::reader::RowIter;
use ::parquet::record::{Field, Row};
use ::parquet::schema::types::{Type, TypePtr};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// The rows of a file, page by page, without the nulls.
pub fn rows(path: &Path) -> Result<impl Iterator<Item = Result<Piece>> + use<>> {
    let (mut rows, count) = caught(|| open(path))?;
    let path = path.to_owned();
    let read = std::fs::metadata(&path)?.len() / count.max(1);
    Ok((0..count).filter_map(move |position| {
        let next = || rows.next().context("there are fewer rows than its header says")?.map_err(Into::into);
        let text = caught(next).and_then(text).with_context(|| format!("{}: row {position}", path.display()));
        let piece = |text| Piece { content: Content::Text(text), position, first: true, last: true, read };
        text.map(|text| text.map(piece)).transpose()
    }))
}

/// The column `text`, and its number of rows.
fn open(path: &Path) -> Result<(RowIter<'static>, u64)> {
    let reader = SerializedFileReader::new(File::open(path)?)?;
    let metadata = reader.metadata().file_metadata();
    let count = u64::try_from(metadata.num_rows())?;
    let columns = metadata.schema().get_fields();
    let Some(column) = columns.iter().find(|column| column.name() == "text") else {
        let names: Vec<&str> = columns.iter().map(|column| column.name()).collect();
        bail!("no column `text`; its columns are {}", names.join(", "));
    };
    let root = Type::group_type_builder(metadata.schema().name());
    let projection = root.with_fields(vec![TypePtr::clone(column)]).build()?;
    Ok((RowIter::from_file_into(Box::new(reader)).project(Some(projection))?, count))
}

/// The only field of a row; `None` if it is null.
fn text(row: Row) -> Result<Option<String>> {
    Ok(match row.into_columns().pop() {
        Some((_, Field::Str(text))) => Some(text),
        Some((_, Field::Bytes(bytes))) => Some(bytes.as_utf8()?.to_owned()),
        Some((_, Field::Null)) | None => None,
        Some(_) => bail!("the column `text` does not hold strings"),
    })
}

/// The parquet crate panics on some damaged files; here that is an error.
fn caught<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| bail!("the file is damaged"))
}
