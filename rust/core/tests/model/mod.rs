//! The oracle: what an index does, written for reading. Every step looks at every node; recency is a time stamp.

use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Reserved,
    Written,
    Visible,
    Leaving,
}

/// Nodes are numbered in the order of their reservation and never reuse a number.
pub type Id = u64;

#[derive(Debug)]
pub struct Node {
    pub path: Vec<u8>,
    pub row: u32,
    pub state: State,
    parent: Option<Id>,
    writing: bool,
    leases: u32,
    last_use: i64,
    /// Not passed over by an eviction since its last use.
    listed: bool,
    saved: bool,
}

/// Chunks that were taken: for each its number in its prefix, and its nodes.
pub type Taken = Vec<(usize, Vec<Id>)>;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    pub rows: u64,
    pub free: u64,
    pub visible: u64,
    pub reserved: u64,
    pub leaving: u64,
}

#[derive(Debug)]
pub struct Model {
    pub nodes: BTreeMap<Id, Node>,
    pub limit: usize,
    pub evictions: u64,
    pub unsaved_evictions: u64,
    next_id: Id,
    now: i64,
    coldest: i64,
}

impl Model {
    pub fn new(rows: usize) -> Self {
        Self {
            nodes: BTreeMap::new(),
            limit: rows,
            evictions: 0,
            unsaved_evictions: 0,
            next_id: 0,
            now: 0,
            coldest: 0,
        }
    }

    fn node(&mut self, id: Id) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    fn indexed(&self, path: &[u8]) -> Option<Id> {
        let found = self.nodes.iter().find(|(_, node)| node.path == path && node.state != State::Leaving);
        found.map(|(&id, _)| id)
    }

    /// Blocks from the start of `path` for which `counts` holds, and the last of them.
    fn prefix(&self, path: &[u8], counts: impl Fn(&Node) -> bool) -> (usize, Option<Id>) {
        let mut last = None;
        for blocks in 0..path.len() {
            match self.indexed(&path[..=blocks]) {
                Some(id) if counts(&self.nodes[&id]) => last = Some(id),
                _ => return (blocks, last),
            }
        }
        (path.len(), last)
    }

    fn children(&self, id: Id) -> Vec<Id> {
        self.nodes.iter().filter(|(_, node)| node.parent == Some(id)).map(|(&id, _)| id).collect()
    }

    fn touch(&mut self, id: Id) {
        self.now += 1;
        let now = self.now;
        let node = self.node(id);
        (node.last_use, node.listed) = (now, true);
    }

    fn is_idle_leaf(&self, id: Id) -> bool {
        let node = &self.nodes[&id];
        !node.writing && node.leases == 0 && self.children(id).is_empty()
    }

    pub fn gauges(&self) -> Gauges {
        let count =
            |states: &[State]| self.nodes.values().filter(|node| states.contains(&node.state)).count() as u64;
        Gauges {
            rows: self.limit as u64,
            free: self.free() as u64,
            visible: count(&[State::Visible]),
            reserved: count(&[State::Reserved, State::Written]),
            leaving: count(&[State::Leaving]),
        }
    }

    fn free(&self) -> usize {
        self.limit - self.nodes.values().filter(|node| (node.row as usize) < self.limit).count()
    }

    pub fn present(&self, path: &[u8]) -> usize {
        self.prefix(path, |_| true).0
    }

    /// Blocks found, the last of them, and whether the next is in flight.
    pub fn lookup(&mut self, path: &[u8]) -> (usize, Option<Id>, bool) {
        let (blocks, last) = self.prefix(path, |node| node.state == State::Visible);
        if let Some(id) = last {
            self.touch(id);
        }
        let pending = blocks < path.len() && self.indexed(&path[..=blocks]).is_some();
        (blocks, last, pending)
    }

    /// Rows that a reservation of `path` gets, after evictions: position of the first, how many, how many not.
    pub fn make_room(&mut self, path: &[u8]) -> (usize, usize, usize) {
        let (first, last) = self.prefix(path, |_| true);
        let wanted = path.len() - first;
        while self.free() < wanted.min(self.limit) {
            let evictable = |id: &Id| {
                self.nodes[id].state == State::Visible && self.is_idle_leaf(*id) && Some(*id) != last
            };
            let candidates = self.nodes.keys().copied().filter(evictable);
            let Some(victim) = candidates.min_by_key(|id| self.nodes[id].last_use) else {
                self.pass_over(i64::MAX);
                break;
            };
            let victim = self.nodes.remove(&victim).unwrap();
            self.evictions += 1;
            self.unsaved_evictions += u64::from(!victim.saved);
            self.pass_over(victim.last_use);
            if let Some(id) = victim.parent.filter(|id| self.nodes.contains_key(id)) {
                let may_leave = self.is_idle_leaf(id) && Some(id) != last;
                let parent = self.node(id);
                if !parent.listed {
                    // Its own last use is not later, or it would be among those that leave.
                    (parent.last_use, parent.listed) = (victim.last_use, may_leave);
                }
            }
        }
        let given = wanted.min(self.free());
        // It was held while others left. Without a child it may leave like them.
        if let Some(id) = last.filter(|&id| given == 0 && self.is_idle_leaf(id)) {
            self.node(id).listed |= self.nodes[&id].state == State::Visible;
        }
        (first, given, wanted - given)
    }

    /// An eviction looked at all that was used before `last_use`, which cannot leave.
    fn pass_over(&mut self, last_use: i64) {
        for node in self.nodes.values_mut().filter(|node| node.last_use < last_use) {
            node.listed = false;
        }
    }

    /// Takes `rows`, which the index gave, for the blocks of `path` from `first` on.
    pub fn reserve(&mut self, path: &[u8], first: usize, rows: &[u32]) -> Vec<Id> {
        let mut parent = self.prefix(&path[..first], |_| true).1;
        let mut ids = Vec::new();
        for (&row, end) in rows.iter().zip(first + 1..) {
            assert!((row as usize) < self.limit, "row {row} is out of use");
            assert!(self.nodes.values().all(|node| node.row != row), "row {row} is another's");
            let path = path[..end].to_vec();
            let node = Node {
                path,
                row,
                state: State::Reserved,
                parent,
                writing: true,
                leases: 0,
                last_use: i64::MIN,
                listed: false,
                saved: false,
            };
            self.nodes.insert(self.next_id, node);
            parent = Some(self.next_id);
            ids.push(self.next_id);
            self.next_id += 1;
        }
        ids
    }

    pub fn commit(&mut self, ids: &[Id], saved: bool) -> u64 {
        let wanted: Vec<Id> =
            ids.iter().copied().filter(|id| self.nodes[id].state == State::Reserved).collect();
        self.end_writing(ids);
        for &id in &wanted {
            let parent = self.nodes[&id].parent;
            self.node(id).state = State::Written;
            self.node(id).saved = saved;
            if parent.is_none_or(|id| self.nodes[&id].state == State::Visible) {
                self.reveal(id);
            }
        }
        wanted.len() as u64
    }

    fn reveal(&mut self, id: Id) {
        self.node(id).state = State::Visible;
        let children = self.children(id);
        if children.is_empty() {
            self.touch(id);
        }
        for child in children.into_iter().rev() {
            if self.nodes[&child].state == State::Written {
                self.reveal(child);
            }
        }
    }

    pub fn abort(&mut self, ids: &[Id]) -> u64 {
        let removed = ids.first().map_or(0, |&id| self.remove(id));
        self.end_writing(ids);
        removed
    }

    fn end_writing(&mut self, ids: &[Id]) {
        for id in ids {
            self.node(*id).writing = false;
        }
        for id in ids.iter().rev() {
            self.free_if_unused(*id);
        }
    }

    /// Removes `id` and all below; 0 when it was removed before.
    pub fn remove(&mut self, id: Id) -> u64 {
        if self.nodes.get(&id).is_none_or(|node| node.state == State::Leaving) {
            return 0;
        }
        self.node(id).state = State::Leaving;
        self.node(id).listed = false;
        let children = self.children(id);
        let removed = 1 + children.into_iter().map(|child| self.remove(child)).sum::<u64>();
        self.free_if_unused(id);
        removed
    }

    /// Removes every row from `first` on.
    pub fn remove_from(&mut self, first: usize) -> u64 {
        let rows = self.nodes.values().map(|node| node.row as usize).max().map_or(0, |row| row + 1);
        (first..rows)
            .map(|row| {
                let found = self.nodes.iter().find(|(_, node)| node.row as usize == row);
                found.map(|(&id, _)| id).map_or(0, |id| self.remove(id))
            })
            .sum()
    }

    fn free_if_unused(&mut self, id: Id) {
        let Some(node) = self.nodes.get(&id) else { return };
        let parent = node.parent;
        if node.state != State::Leaving || !self.is_idle_leaf(id) {
            return;
        }
        self.nodes.remove(&id);
        let Some(parent) = parent else { return };
        if self.nodes[&parent].state == State::Visible && self.children(parent).is_empty() {
            self.touch(parent);
        }
        self.free_if_unused(parent);
    }

    /// Whether `id` could be leased, and was.
    pub fn lease(&mut self, id: Id) -> bool {
        let node = self.nodes.get_mut(&id).filter(|node| node.state != State::Leaving);
        node.map(|node| node.leases += 1).is_some()
    }

    pub fn release(&mut self, id: Id) {
        let node = self.node(id);
        node.leases -= 1;
        if node.leases == 0 && node.state == State::Visible {
            self.touch(id);
        }
        self.free_if_unused(id);
    }

    /// As `release`, of a departure: no use, but what was passed over is the next to leave.
    pub fn release_departure(&mut self, id: Id) {
        self.node(id).leases -= 1;
        let node = &self.nodes[&id];
        if self.is_idle_leaf(id) && node.state == State::Visible && !node.listed {
            self.coldest -= 1;
            let coldest = self.coldest;
            let node = self.node(id);
            (node.last_use, node.listed) = (coldest, true);
        }
        self.free_if_unused(id);
    }

    /// Chunks of the visible prefix of `path` that were not saved; the last is leased.
    pub fn take_unsaved(&mut self, path: &[u8], size: usize) -> Taken {
        let (blocks, last) = self.prefix(path, |node| node.state == State::Visible);
        let ids = last.map_or(Vec::new(), |id| self.chain(id));
        let is_taken = |chunk: &[Id]| {
            let is_whole = chunk.len() == size || blocks == path.len();
            is_whole && !self.nodes[chunk.last().unwrap()].saved
        };
        let chunks = ids.chunks(size).enumerate().filter(|(_, chunk)| is_taken(chunk));
        let taken: Taken = chunks.map(|(number, chunk)| (number, chunk.to_vec())).collect();
        self.mark(&taken);
        taken
    }

    /// Chunks that were not saved and end with one of the `rows_max` nodes that leave first, and those before.
    pub fn take_coldest(&mut self, size: usize, rows_max: usize, chunks_max: usize) -> Vec<Taken> {
        let mut listed: Vec<Id> = self.nodes.keys().copied().filter(|id| self.nodes[id].listed).collect();
        listed.sort_by_key(|id| self.nodes[id].last_use);
        listed.truncate(rows_max);
        listed.retain(|&id| self.is_idle_leaf(id) && !self.nodes[&id].saved);
        let mut room = chunks_max;
        let mut all = Vec::new();
        for leaf in listed {
            let ids = self.chain(leaf);
            let chunks: Vec<(usize, &[Id])> = ids.chunks(size).enumerate().collect();
            let unsaved = chunks.iter().rev();
            let unsaved =
                unsaved.take_while(|(_, chunk)| !self.nodes[chunk.last().unwrap()].saved).take(room);
            let mut taken: Taken = unsaved.map(|&(number, chunk)| (number, chunk.to_vec())).collect();
            taken.reverse();
            room -= taken.len();
            self.mark(&taken);
            all.extend((!taken.is_empty()).then_some(taken));
        }
        all
    }

    fn mark(&mut self, taken: &Taken) {
        for &id in taken.iter().flat_map(|(_, chunk)| chunk) {
            self.node(id).saved = true;
        }
        if let Some(&last) = taken.last().and_then(|(_, chunk)| chunk.last()) {
            self.node(last).leases += 1;
        }
    }

    /// Ids from the start of a prefix to `id`.
    pub fn chain(&self, id: Id) -> Vec<Id> {
        let mut ids: Vec<Id> = std::iter::successors(Some(id), |id| self.nodes[id].parent).collect();
        ids.reverse();
        ids
    }
}
