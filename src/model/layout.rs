//! Where each parameter lies in a row of the trajectory, or in the flat tensor of the ends.

/// How a segment is initialised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Normal(f64),
    Ones,
    Zeros,
}

/// One named parameter inside a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Path in a checkpoint below `/blocks` or `/ends`: `attn/qkv/weight`.
    pub name: &'static str,
    pub shape: Vec<usize>,
    /// First element in the row.
    pub offset: usize,
    pub init: Init,
    /// Weight decay acts on matrices only.
    pub decay: bool,
    /// A hidden matrix that Muon orthogonalises (not embeddings, not the head).
    pub orthogonalize: bool,
}

/// The segments of a row, in order, without gaps.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    pub segments: Vec<Segment>,
}

impl Segment {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Layout {
    /// P: elements of a row.
    pub fn len(&self) -> usize {
        self.segments.iter().map(Segment::len).sum()
    }
    /// One block: ln1 [2,d], attn/qkv/{weight [3d,d], bias}, attn/proj/{weight,bias}, ln2 [2,d], mlp/fc/{weight [4d,d],bias}, mlp/proj/{weight [d,4d],bias}
    pub fn block(_spec: &super::Spec) -> Layout {
        todo!()
    }
    /// The ends: wte [V,d], wpe [T,d], ln_f [2,d], head [V,d] if untied.
    pub fn ends(_spec: &super::Spec) -> Layout {
        todo!()
    }
}
