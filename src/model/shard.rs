//! How the columns of a row are divided among ranks.
//!
//! Everything about depth acts on axis 0 of [R, P]. A rank that keeps the same columns of every row, on every level, can do
//! all of it alone.

use super::{Layout, Segment};
use std::ops::Range;

/// Among how many ranks rows are divided, and which of them this one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    pub rank: usize,
    pub ranks: usize,
    /// Cut between hidden matrices only; else anywhere.
    pub whole_matrices: bool,
}

/// A GPU reads vectors of up to this many elements: a cut at a multiple keeps them whole.
const ALIGNMENT: usize = 16;

impl Division {
    /// One rank has all.
    pub const NONE: Division = Division { rank: 0, ranks: 1, whole_matrices: false };

    /// The columns of each rank: about as many for each, some for none where there are few. They cover the row in order.
    pub fn columns(&self, layout: &Layout) -> Vec<Range<usize>> {
        (0..self.ranks).map(|rank| self.cut(layout, rank)..self.cut(layout, rank + 1)).collect()
    }

    /// The first column of `rank`.
    fn cut(&self, layout: &Layout, rank: usize) -> usize {
        let end = layout.len();
        if rank == self.ranks {
            return end;
        }
        let even = (end as u128 * rank as u128 / self.ranks as u128) as usize / ALIGNMENT * ALIGNMENT;
        let inside = |segment: &&Segment| segment.matrices > 0 && segment.columns().contains(&even);
        match layout.segments.iter().find(inside).filter(|_| self.whole_matrices) {
            Some(segment) => {
                let size = segment.len() / segment.matrices;
                let nearest = (even - segment.offset + size / 2) / size;
                segment.offset + nearest * size
            }
            None => even,
        }
    }
}

/// The columns of every row that one rank keeps, of each row's layout.
#[derive(Clone, Debug)]
pub struct Shard {
    /// Columns of each rank.
    pub ranks: Vec<Range<usize>>,
    /// This rank's.
    pub columns: Range<usize>,
    /// The segments in them; offsets count from the first.
    pub layout: Layout,
}

impl Shard {
    pub fn new(layout: &Layout, division: Division) -> Shard {
        let ranks = division.columns(layout);
        let columns = ranks[division.rank].clone();
        Shard { layout: layout.slice(&columns), columns, ranks }
    }

    /// All columns.
    pub fn whole(layout: &Layout) -> Shard {
        Shard::new(layout, Division::NONE)
    }

    /// One rank has all columns.
    pub fn is_whole(&self) -> bool {
        self.ranks.len() == 1
    }

    /// P
    pub fn width(&self) -> usize {
        self.ranks.last().map_or(0, |columns| columns.end)
    }
}

impl Layout {
    /// What of the segments lies in `columns`, as a layout of its own. A part that is no list of whole rows or matrices is flat,
    /// and no matrix any more.
    fn slice(&self, columns: &Range<usize>) -> Layout {
        let part = |segment: &Segment| {
            let own = segment.columns();
            let (begin, end) = (own.start.max(columns.start), own.end.min(columns.end));
            (begin < end).then(|| segment.part(begin - own.start..end - own.start, begin - columns.start))
        };
        Layout { segments: self.segments.iter().filter_map(part).collect() }
    }
}

impl Segment {
    /// Its columns in the row.
    fn columns(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }

    fn part(&self, elements: Range<usize>, offset: usize) -> Segment {
        let unit = self.len() / self.matrices.max(1);
        let whole = elements.start.is_multiple_of(unit) && elements.end.is_multiple_of(unit);
        let (shape, matrices) = match self.shape[..] {
            _ if elements.len() == self.len() => (self.shape.clone(), self.matrices),
            [_, width] if self.matrices > 0 && whole => (vec![elements.len() / width, width], elements.len() / unit),
            _ => (vec![elements.len()], 0),
        };
        Segment { shape, matrices, offset, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Spec;

    fn layouts() -> [Layout; 2] {
        let spec = Spec { width: 24, heads: 3, vocab: 101, ..Spec::small() };
        [Layout::block(&spec), Layout::ends(&spec)]
    }

    #[test]
    fn shards_cover_the_row_in_order() {
        for (layout, whole_matrices) in layouts().iter().flat_map(|layout| [(layout, false), (layout, true)]) {
            for ranks in [1, 2, 3, 4, 7, 64, 1000] {
                let mut end = 0;
                for rank in 0..ranks {
                    let shard = Shard::new(layout, Division { rank, ranks, whole_matrices });
                    assert_eq!((shard.columns.start, shard.width()), (end, layout.len()));
                    assert_eq!(shard.layout.len(), shard.columns.len());
                    let mut offset = 0;
                    for segment in &shard.layout.segments {
                        assert_eq!(segment.offset, offset);
                        offset += segment.len();
                    }
                    end = shard.columns.end;
                }
                assert_eq!(end, layout.len());
            }
        }
    }

    #[test]
    fn shards_are_even_where_any_cut_will_do() {
        for layout in layouts() {
            for ranks in [2, 3, 5] {
                let even = layout.len() / ranks;
                let columns = Division { rank: 0, ranks, whole_matrices: false }.columns(&layout);
                assert!(columns.iter().all(|columns| columns.len().abs_diff(even) <= ALIGNMENT), "{columns:?}");
            }
        }
    }

    /// Every matrix is in one shard, whole; q, k and v are three.
    #[test]
    fn no_matrix_is_cut_where_they_must_be_whole() {
        let [blocks, _] = layouts();
        let matrices = |layout: &Layout| layout.segments.iter().map(|segment| segment.matrices).sum::<usize>();
        assert_eq!(matrices(&blocks), 6);
        for ranks in [2, 3, 4, 6, 9] {
            let shard = |rank| Shard::new(&blocks, Division { rank, ranks, whole_matrices: true });
            let found: usize = (0..ranks).map(|rank| matrices(&shard(rank).layout)).sum();
            assert_eq!(found, 6, "{ranks} ranks");
            for segment in (0..ranks).flat_map(|rank| shard(rank).layout.segments).filter(|s| s.matrices > 0) {
                let whole = blocks.segments.iter().find(|whole| whole.name == segment.name).unwrap();
                assert_eq!(segment.shape[0] / segment.matrices, whole.shape[0] / whole.matrices);
                assert_eq!(segment.shape[1], whole.shape[1]);
            }
        }
    }
}
