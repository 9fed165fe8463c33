//! What people see: lines that stay, and on a terminal a few below them that are drawn again in place.
//!
//! The trap: a line wider than the terminal wraps, the cursor is then a row lower than counted, and each redraw eats one
//! line of history. So wrapping is off (DECAWM) while the lines are drawn: the terminal itself cuts them.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) struct Screen {
    live: bool,
    colours: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    drawn: Vec<String>,
    closed: bool,
}

#[derive(Clone, Copy)]
pub(super) enum Colour {
    Green,
    Yellow,
    Red,
}

impl Screen {
    pub(super) fn new() -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let live = std::io::stdout().is_terminal() && set("TERM").is_none_or(|term| term != "dumb");
        Self { live, colours: live && set("NO_COLOR").is_none(), state: Mutex::default() }
    }

    /// Whether `draw` draws; else nobody can see a line change.
    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    /// Nobody reads any more: `pgoutbox demo | head`.
    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// A line that stays.
    pub(super) fn say(&self, line: &str) {
        let mut state = self.state();
        let lines = std::mem::take(&mut state.drawn);
        let again = drawing(&lines);
        write(&mut state, &format!("{}{line}\n{again}", erasing(lines.len())));
        state.drawn = lines;
    }

    /// Replaces the lines drawn before.
    pub(super) fn draw(&self, lines: Vec<String>) {
        if !self.live {
            return;
        }
        let mut state = self.state();
        let text = erasing(state.drawn.len()) + &drawing(&lines);
        write(&mut state, &text);
        state.drawn = lines;
    }

    pub(super) fn coloured(&self, colour: Colour, text: &str) -> String {
        let code = match colour {
            _ if !self.colours => return text.to_owned(),
            Colour::Green => 32,
            Colour::Yellow => 33,
            Colour::Red => 31,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One write, so that nothing flickers. `println!` would panic when the reader is gone.
fn write(state: &mut State, text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        state.closed = true;
    }
}

fn erasing(rows: usize) -> String {
    if rows == 0 { String::new() } else { format!("\x1b[{rows}A\r\x1b[J") }
}

fn drawing(lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    format!("\x1b[?7l{}\n\x1b[?7h", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redraw_goes_up_as_many_rows_as_were_drawn() {
        let lines = ["one".to_owned(), "two".to_owned()];
        assert_eq!(drawing(&lines).matches('\n').count(), 2);
        assert_eq!(erasing(2), "\x1b[2A\r\x1b[J");
        assert_eq!(erasing(0) + &drawing(&[]), "");
    }
}
