//! Parquet: a document a row, in the column `text`.

use super::{Content, Piece};
use crate::error::{Context, Result, bail};
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::reader::RowIter;
use ::parquet::record::{Field, Row};
use ::parquet::schema::types::{Type, TypePtr};
use std::fs::File;
use std::path::Path;

/// The rows of a file, page by page, without the nulls.
pub fn rows(path: &Path) -> Result<impl Iterator<Item = Result<Piece>> + use<>> {
    let reader = SerializedFileReader::new(File::open(path)?)?;
    let metadata = reader.metadata().file_metadata();
    let read = std::fs::metadata(path)?.len() / u64::try_from(metadata.num_rows())?.max(1);

    let columns = metadata.schema().get_fields();
    let Some(column) = columns.iter().find(|column| column.name() == "text") else {
        let names: Vec<&str> = columns.iter().map(|column| column.name()).collect();
        bail!("no column `text`; its columns are {}", names.join(", "));
    };
    let projection =
        Type::group_type_builder(metadata.schema().name()).with_fields(vec![TypePtr::clone(column)]).build()?;

    let path = path.to_owned();
    let rows = RowIter::from_file_into(Box::new(reader)).project(Some(projection))?;
    Ok((0..).zip(rows).filter_map(move |(position, row)| {
        let text =
            row.map_err(Into::into).and_then(text).with_context(|| format!("{}: row {position}", path.display()));
        let piece = |text| Piece { content: Content::Text(text), position, first: true, last: true, read };
        text.map(|text| text.map(piece)).transpose()
    }))
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
