/* The table of an instruction set's functions, from what the file has defined and included before it. */
#define INSTRUCTION_SET(identifier, title)             \
    const struct instruction_set identifier = {        \
        .name = title,                                 \
        .available = available,                        \
        .pack_rows = pack_rows,                        \
        .pack_linear = pack_linear,                    \
        .pack_planes = pack_planes,                    \
        .multiply = multiply,                          \
        .multiply_linear = multiply_linear,            \
        .finish = finish,                              \
        .max_pool = max_pool,                          \
        .prepared_size = prepared_size,                \
        .prepare_inputs = prepare_inputs,              \
        .multiply_floats = multiply_floats,            \
        .attend = attend,                              \
        .signs = signs,                                \
        .sign_bits = sign_bits,                        \
        .inside_bits = inside_bits,                    \
        .signs_of_bits = signs_of_bits,                \
        .keep_where = keep_where,                      \
        .to_bytes = to_bytes,                          \
        .from_bytes = from_bytes,                      \
        .signs_of_bytes = signs_of_bytes,              \
        .keep_within = keep_within,                    \
    }
