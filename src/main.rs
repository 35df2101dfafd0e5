//! The `cowgate` program.

fn main() -> std::process::ExitCode {
    cowgate::cli::main()
}
